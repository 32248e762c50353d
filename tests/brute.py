"""Statistics of a Linear's inputs as they are defined, in float64 over all tokens at once: judge of the streamed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.stream import Statistic


def statistics(inputs: torch.Tensor, width: int) -> dict[Statistic, torch.Tensor]:
    """All statistics of inputs [windows, L, n] whose units own `width` columns each."""
    x = inputs.double().numpy()
    flat = x.reshape(-1, x.shape[-1])
    norms = np.stack([np.linalg.norm(unit, axis=-1) for unit in np.split(x, x.shape[-1] // width, axis=-1)])
    per_window = norms.mean(-1)  # [units, windows]
    found: dict[Statistic, npt.NDArray[Any]] = {
        "gram": flat.T @ flat / len(flat),
        "square": np.mean(flat**2, axis=0),
        "variance": np.var(flat, axis=0),
        "activity": np.sqrt(np.mean(per_window**2, axis=1)),
    }
    return {kind: torch.from_numpy(value).float() for kind, value in found.items()}
