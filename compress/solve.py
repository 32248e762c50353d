"""The linear algebra of pruning: damping, factors, the ridge refit.

All functions take one Linear's weight W [d, n] and the Gram matrix H = X^T X / T [n, n] of its inputs. Small problems
are solved in float64; from 4096 columns on in float32, where a factorisation that fails is repeated in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compress.errors import UserError
from compress.limits import DAMPINGS, DOUBLE_UP_TO


def damping_vector(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The ridge [n] added to H's diagonal: `damping` times the mean of the diagonal for every column. One where inputs
    are all zero: they say nothing, and any ridge leaves the weights as they are."""
    mean = float(hessian.diagonal().mean())
    return torch.full_like(hessian.diagonal(), damping * mean if mean else 1.0)


def working_dtype(columns: int) -> torch.dtype:
    """float64 where it is cheap, float32 for wide modules."""
    return torch.float64 if columns <= DOUBLE_UP_TO else torch.float32


def factor(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """Lower Cholesky factor of a damped matrix, or of several [*, n, n]; `what` names the module if even float64 finds
    one singular."""
    lower: torch.Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()) and matrix.dtype != torch.float64:
        lower, info = torch.linalg.cholesky_ex(matrix.double())
        lower = lower.to(matrix.dtype)
    if bool(info.any()):
        _check_numbers(float(matrix.sum(dtype=torch.float64)), what)
        raise UserError(
            f"{what}: the activation statistics are singular even with damping",
            hint="raise --damping, or use more data",
        )
    return lower


def _check_numbers(total: float, what: str) -> None:
    """UserError for a sum over a module's statistics that is no number: then one of them is none."""
    if not math.isfinite(total):
        raise UserError(f"{what}: activations are NaN or infinite")


@dataclass(frozen=True)
class Refit:
    """`weight` [d, k] for the kept columns; `error` = ||V X_K - W X||^2 / ||W X||^2 on the calibration inputs, and
    `error_before` the same without the refit."""

    weight: torch.Tensor
    error: float
    error_before: float


@dataclass(frozen=True)
class Shift:
    """What is wanted of a Linear beside its own outputs, E [T, d]: `product` E^T X / T [d, n] with its inputs X, and
    `energy`, the mean of |e|^2."""

    product: torch.Tensor
    energy: float


def refit(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    keep: torch.Tensor,
    ridge: torch.Tensor,
    what: str = "module",
    shift: Shift | None = None,
) -> Refit:
    """Least-squares refit of the kept columns from the original weights.

    V = (C[:,K] + W[:,K] L) (H[K,K] + L)^-1 with C = W H and L = diag(ridge[K]): the minimum over V of
    ||V X_K - W X||^2 / T + ||(V - W_K) L^(1/2)||^2.  weight [d, n], hessian [n, n], keep [k] ascending, ridge [n].
    With a shift W X + E is wanted in the place of W X, and errors are relative to it.
    """
    product, energy = _outputs(weight, hessian)
    if shift is not None:
        energy += 2 * float((shift.product * weight).sum(dtype=torch.float64)) + shift.energy
        product += shift.product
    _check_numbers(energy, what)
    product = product[:, keep]
    inner = hessian[keep][:, keep].to(working_dtype(len(hessian)))
    solved = _solved(weight[:, keep], inner, product, ridge[keep], what)
    error = _error(solved, inner, product, energy)
    if shift is None:
        before = _lost(weight, hessian, keep, energy)
    else:
        before = _error(weight[:, keep].to(inner.dtype), inner, product, energy)
    return Refit(solved.to(torch.float32).contiguous(), error, before)


def refit_to(
    weight: torch.Tensor, hessian: torch.Tensor, product: torch.Tensor, energy: float, ridge: torch.Tensor, what: str
) -> Refit:
    """Least-squares refit to outputs Y that other inputs once gave, near `weight`.

    V = (C + W L) (H + L)^-1 with H = X^T X / T, C = Y^T X / T and L = diag(ridge): the minimum over V of
    ||V X - Y||^2 / T + ||(V - W) L^(1/2)||^2.  weight [d, n], hessian [n, n], product C [d, n], energy E|y|^2; the
    errors of the result are relative to it.
    """
    _check_numbers(energy + float(hessian.sum(dtype=torch.float64)), what)
    inner = hessian.to(working_dtype(len(hessian)))
    before = _error(weight.to(inner.dtype), inner, product, energy)
    solved = _solved(weight, inner, product, ridge, what)
    return Refit(solved.to(torch.float32).contiguous(), _error(solved, inner, product, energy), before)


def _solved(
    near: torch.Tensor, inner: torch.Tensor, product: torch.Tensor, ridge: torch.Tensor, what: str
) -> torch.Tensor:
    """V = (C + W L) (H + L)^-1 in the dtype of H; near W [d, k], inner H [k, k], product C [d, k], ridge [k] of L."""
    ridge, system = ridge.to(inner.dtype), inner.clone()
    system.diagonal().add_(ridge)
    lower = factor(system, what)
    del system
    right = product.to(inner.dtype) + near.to(inner.dtype) * ridge
    return torch.cholesky_solve(right.T, lower).T


@dataclass(frozen=True)
class HeldOut:
    """The Gram matrix H_v [n, n] of the windows kept back, and their share of the tokens that H is made of."""

    gram: torch.Tensor
    share: float


def best_damping(
    weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor, held: HeldOut, what: str = "module"
) -> tuple[float, float]:
    """The damping of DAMPINGS whose refit, made without the held-out windows, has the least output error on them, and
    that error, relative as in `Refit`. weight [d, n], hessian [n, n] of all windows, keep [k] ascending.

    Hold-out choice of a ridge (Hastie, Tibshirani & Friedman 2009, section 7.10). H without the held-out windows is
    (H - s H_v) / (1 - s), s their share.
    """
    fit = torch.sub(hessian, held.gram, alpha=held.share).div_(1 - held.share)
    product, energy = _outputs(weight, fit)
    _check_numbers(energy, what)
    near, product, own = weight[:, keep], product[:, keep], fit[keep][:, keep].to(working_dtype(len(fit)))
    asked, energy = _outputs(weight, held.gram)
    asked, inner = asked[:, keep], held.gram[keep][:, keep]
    found = []
    for damping in DAMPINGS:
        solved = _solved(near, own, product, damping_vector(fit, damping)[keep], what).float()
        found.append((_error(solved, inner, asked, energy), damping))
    error, damping = min(found)
    return damping, error


def cut_error(weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor) -> float:
    """||W_K X_K - W X||^2 / ||W X||^2: the relative output error of a cut without refit."""
    return _lost(weight, hessian, keep, _outputs(weight, hessian)[1])


def _outputs(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, float]:
    """C = W H [d, n], and tr(W H W^T) = ||W X||^2 / T."""
    product = weight.to(torch.float32) @ hessian
    return product, float((product * weight).sum(dtype=torch.float64))


def _lost(weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor, energy: float) -> float:
    # W_K X_K - W X = -W_G X_G, G the columns that go: fewer than those that stay, and no difference of large numbers
    stays = torch.zeros(weight.shape[1], dtype=torch.bool, device=keep.device)
    stays[keep] = True
    gone = (~stays).nonzero().flatten()
    dtype = working_dtype(len(hessian))
    lost, inner = weight[:, gone].to(dtype), hessian[gone][:, gone].to(dtype)
    square = float(((lost @ inner) * lost).sum(dtype=torch.float64))
    return max(0.0, square) / energy if energy > 0 else 0.0


def _error(kept: torch.Tensor, inner: torch.Tensor, product: torch.Tensor, energy: float) -> float:
    # ||V X_K - W X||^2 = tr(V H_KK V^T) - 2 tr(V C_K^T) + tr(W H W^T), all divided by the last term
    square = float(((kept @ inner) * kept).sum(dtype=torch.float64))
    cross = float((kept.to(product.dtype) * product).sum(dtype=torch.float64))
    return max(0.0, (square - 2 * cross + energy) / energy) if energy > 0 else 0.0
