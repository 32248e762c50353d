"""One Linear's weights and inputs, small enough to solve by numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.solve import damping_vector

Array = npt.NDArray[np.float64]


class Problem:
    """Weights W [d, n], correlated inputs X [T, n] of uneven size, H = X^T X / T and a ridge of uneven entries."""

    def __init__(self, columns: int, *, rows: int = 6, tokens: int = 200, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        mixing = np.eye(columns) + 0.4 * random.standard_normal((columns, columns))
        sizes = np.exp(0.5 * random.standard_normal(columns))
        self.x: Array = (random.standard_normal((tokens, columns)) @ mixing * sizes).astype(np.float32).astype(float)
        self.w: Array = random.standard_normal((rows, columns)).astype(np.float32).astype(float)
        self.weight = torch.tensor(self.w, dtype=torch.float32)
        self.hessian = torch.tensor(self.x.T @ self.x / tokens, dtype=torch.float32)
        self.ridge = damping_vector(self.hessian, 0.01) * torch.linspace(0.5, 1.5, columns)
        # rows of the augmented system: ||A v||^2 = v^T (H + L) v
        self.rows: Array = np.concatenate([self.x / tokens**0.5, np.diag(self.ridge.double().sqrt().numpy())])

    def error(self, weight: Array) -> float:
        """||V X - W X||^2 / ||W X||^2."""
        return float(((weight - self.w) @ self.x.T).__pow__(2).sum() / ((self.w @ self.x.T) ** 2).sum())

    def cost(self, gone: tuple[int, ...]) -> float:
        """||D X||^2 / T of the D that removes the columns `gone` (D = -W there) at the least ||D A^T||^2."""
        stay, scaled = [j for j in range(self.w.shape[1]) if j not in gone], self.x / len(self.x) ** 0.5
        lost = self.rows[:, list(gone)] @ self.w[:, list(gone)].T
        update = np.linalg.lstsq(self.rows[:, stay], lost, rcond=None)[0]
        return float(((scaled[:, stay] @ update - scaled[:, list(gone)] @ self.w[:, list(gone)].T) ** 2).sum())


def embedded(kept: npt.NDArray[Any], keep: list[int], columns: int) -> Array:
    """Weights [d, k] of the kept columns at their places in [d, columns]."""
    full = np.zeros((len(kept), columns))
    full[:, keep] = kept
    return full
