"""Statistics of a Linear's inputs as they are defined, in float64 over all tokens at once: judge of the streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.stream import Statistic


def statistics(inputs: torch.Tensor, width: int, weights: torch.Tensor | None = None) -> dict[Statistic, torch.Tensor]:
    """All statistics of inputs [windows, L, n] whose units own `width` columns each; weights [windows, L]."""
    x = inputs.double().numpy()
    flat = x.reshape(-1, x.shape[-1])
    w = np.ones(x.shape[:2]) if weights is None else weights.double().numpy()
    each, windows = w.flatten(), w.sum(1)
    norms = np.stack([np.linalg.norm(unit, axis=-1) for unit in np.split(x, x.shape[-1] // width, axis=-1)])
    per_window = np.einsum("unl,nl->un", norms, w) / np.maximum(windows, 1e-300)  # [units, windows]
    mean = np.average(flat, axis=0, weights=each)
    found: dict[Statistic, npt.NDArray[Any]] = {
        "gram": flat.T @ (flat * each[:, None]) / each.sum(),
        "square": np.average(flat**2, axis=0, weights=each),
        "variance": np.average((flat - mean) ** 2, axis=0, weights=each),
        "activity": np.sqrt(np.average(per_window**2, axis=1, weights=windows)),
    }
    return {kind: torch.from_numpy(value).float() for kind, value in found.items()}
