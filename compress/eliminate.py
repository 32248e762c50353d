"""Elimination with second-order updates: which columns go first, and what every cut in a given order costs.

As in solve.py, all functions take one Linear's weight W [d, n] and the Gram matrix H = X^T X / T [n, n] of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.solve import factor, working_dtype

REFRESH = 1024  # removals after which the downdated inverse is recomputed (rounding accumulates)
ALONE = 512  # columns whose rows of an inverse are made at once


@dataclass(frozen=True)
class Removal:
    """Units in the order they went and what each one cost when it went (increase of ||dW X||^2 / T)."""

    order: torch.Tensor
    cost: torch.Tensor


def greedy_removal(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    ridge: torch.Tensor,
    *,
    width: int = 1,
    block: int = 16,
    what: str = "module",
) -> Removal:
    """Optimal-brain-surgeon elimination of column groups of `width`, `block` columns a round, until none is left.

    The others take over what a unit gave by the update that is best under H + L, and the unit whose update adds least
    to the error under H goes (`_Alive`). The costs of one round are those of each unit alone. weight [d, n], hessian
    [n, n], ridge [n]: the diagonal of L.
    """
    dtype = working_dtype(len(hessian))
    units = torch.arange(weight.shape[1] // width, device=weight.device)
    whole, ridges = weight.to(dtype), ridge.to(dtype)
    alive = _Alive(whole, whole.clone(), ridges, _inverse(hessian, ridge, _columns(units, width), dtype, what), width)
    order: list[torch.Tensor] = []
    cost: list[torch.Tensor] = []
    since_refresh = 0
    while len(units):
        score = alive.costs()
        if since_refresh >= REFRESH or not bool(torch.isfinite(score).all()):
            current = alive.current
            del alive  # at most three matrices of this size at a time: plans count as many
            columns = _columns(units, width)
            inverse = _inverse(hessian, ridge, columns, dtype, what)
            alive = _Alive(whole[:, columns], current, ridges[columns], inverse, width)
            score = alive.costs()
            since_refresh = 0
        count = min(max(1, block // width), len(units))
        position = torch.argsort(score, stable=True)[:count]
        order.append(units[position])
        cost.append(score[position])
        stay = torch.ones(len(units), dtype=torch.bool, device=weight.device)
        stay[position] = False
        alive.remove(_columns(position, width), stay.repeat_interleave(width))
        units = units[stay]
        since_refresh += count * width
    return Removal(torch.cat(order), torch.cat(cost).clamp_min(0).to(torch.float32))


class _Alive:
    """The columns that are left of an elimination, and what the removal of each of their units adds to the error.

    M = (H + L)^-1 over them, A the weights now, D = A - W. Removing the columns B changes A by -A_B Q M[B,:], with
    Q = M[B,B]^-1, which adds tr(A_B Q A_B^T) to the damped error tr(D (H + L) D^T) (Hassibi & Stork 1993; structured:
    Kurtic et al. 2023, ZipLM, eq. 3). Where one massive activation makes the mean of H's diagonal, and so L, that ranks
    all other units by their weights. So what it adds to tr(D L D^T) is taken off: with R = M L M and P = D L M, that is
    tr(A_B Q R[B,B] Q A_B^T) - 2 tr(A_B Q P_B^T). P and the blocks of R are carried along like M.
    """

    def __init__(
        self, weight: torch.Tensor, current: torch.Tensor, ridge: torch.Tensor, inverse: torch.Tensor, width: int
    ) -> None:
        self.current, self._ridge, self._inverse, self._width = current, ridge, inverse, width
        self._moved = ((current - weight) * ridge) @ inverse  # P [d, n]
        parts = inverse.split(ALONE - ALONE % width or width)  # R's blocks [units, width, width], some rows at a time
        each = [part.view(-1, width, len(inverse)) for part in parts]
        self._ridged = torch.cat([(rows * ridge) @ rows.mT for rows in each])

    def costs(self) -> torch.Tensor:
        """[units]; not finite where rounding has eaten the unit's block of M, which asks for a new one."""
        width, inverse = self._width, self._inverse
        if width == 1:
            own = inverse.diagonal()
            energy, moved = self.current.square().sum(0), (self.current * self._moved).sum(0)
            found = (energy * (1 - self._ridged.flatten() / own) + 2 * moved) / own
            return found.masked_fill(own <= 0, math.nan)
        units = len(inverse) // width
        blocks = torch.stack([inverse[u * width : (u + 1) * width, u * width : (u + 1) * width] for u in range(units)])
        # no batched LU: it calls MKL inside a parallel region, where two threads were seen to wait for ever
        lower, failed = torch.linalg.cholesky_ex(blocks)
        own = torch.cholesky_inverse(lower)  # Q
        mine, moved = (part.view(-1, units, width).movedim(1, 0) for part in (self.current, self._moved))
        lifted = mine @ own  # A_B Q [units, d, width]
        found = ((mine - lifted @ self._ridged + 2 * moved) * lifted).sum((1, 2))
        return found.masked_fill(failed > 0, math.nan)

    def remove(self, gone: torch.Tensor, stay: torch.Tensor) -> None:
        """Let the columns `gone` go and the others, where `stay` [n] says so, take over."""
        inverse, width = self._inverse, self._width
        rows = inverse[gone]
        own = rows[:, gone]
        across = torch.linalg.solve(own, rows[:, stay])  # Q M[B, stay]
        ridged = (rows * self._ridge) @ inverse  # R[B,:]
        twice, ridged = ridged[:, gone] @ across, ridged[:, stay]
        taken = self.current[:, gone]
        lifted = torch.linalg.solve(own, taken.T).T  # A_B Q
        moved = self._moved[:, stay].addmm_(self._moved[:, gone], across, alpha=-1)
        self._moved = moved.addmm_(lifted, ridged - twice, alpha=-1)
        mine, less = (part.view(len(gone), -1, width).permute(1, 2, 0) for part in (across, ridged - twice / 2))
        change = mine @ less.mT
        blocks = stay.view(-1, width)[:, 0]
        self._ridged = self._ridged[blocks] - (change + change.mT)
        self.current = self.current[:, stay].addmm_(taken, across, alpha=-1)
        aside = inverse[stay][:, gone]
        del self._inverse
        inverse = inverse[stay][:, stay].addmm_(aside, across, alpha=-1)
        self._inverse = (inverse + inverse.T).div_(2)
        self._ridge = self._ridge[stay]


def _columns(units: torch.Tensor, width: int) -> torch.Tensor:
    index: torch.Tensor = units[:, None] * width + torch.arange(width, device=units.device)
    return index.flatten()


def _inverse(
    hessian: torch.Tensor, ridge: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype, what: str
) -> torch.Tensor:
    system = hessian[columns][:, columns].to(dtype)
    system.diagonal().add_(ridge[columns].to(dtype))
    lower = factor(system, what)
    del system
    inverse: torch.Tensor = torch.cholesky_inverse(lower)
    return inverse


class Elimination:
    """What the best update leaves of an error when columns go in a given order: all leading cuts from one Cholesky.

    With A = H + L and the columns ordered so that the first to go stands last, A = R R^T (R lower triangular) holds the
    factor of every leading cut: columns S gone, the update of the others that minimises D A D^T under D_S = W_S is
    D = [0, G_S] R^-1 with G = W R, and D A D^T = G_S G_S^T (the trailing block of R is the factor of the Schur
    complement that OBS and SparseGPT update by, Hassibi & Stork 1993; Frantar & Alistarh 2023). The refit of `refit` is
    W - D, so D H D^T = D A D^T - D L D^T is its error. weight W [d, n], hessian H [n, n], ridge [n]: the diagonal of L,
    going [n]: columns from the first to go to the last. energy [d] float64: (W H W^T)_ii, the mean square of every
    output, which is its error when all columns go.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        ridge: torch.Tensor,
        going: torch.Tensor,
        what: str = "module",
    ) -> None:
        dtype = working_dtype(len(hessian))
        self._what = what
        order = going.flip(0)
        system = hessian[order][:, order].to(dtype)
        self._ridge = ridge[order].to(dtype)
        self.energy = (weight.float() @ hessian).mul_(weight).sum(1, dtype=torch.float64)
        system.diagonal().add_(self._ridge)
        lower = factor(system, what)
        del system
        self._weight = weight[:, order].to(dtype)
        self._spread = self._weight @ lower  # G
        identity = torch.eye(len(order), dtype=dtype, device=weight.device)
        self._inverse = torch.linalg.solve_triangular(lower, identity, upper=False)  # R^-1
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(len(order), device=order.device)

    def leading(self, counts: Sequence[int]) -> torch.Tensor:
        """(D H D^T)_ii [len(counts), d] float64: every output's error after the first `count` columns went and the
        others were refitted; counts ascending."""
        outputs, columns = self._weight.shape
        change = torch.zeros_like(self._weight)
        damped = torch.zeros(outputs, dtype=torch.float64, device=change.device)
        found, before = [], 0
        for count in counts:
            gone = slice(columns - count, columns - before)
            reach = columns - before  # R^-1 is lower triangular: right of the block its rows are 0
            change[:, :reach].addmm_(self._spread[:, gone], self._inverse[gone, :reach])
            damped += self._spread[:, gone].square().sum(1, dtype=torch.float64)
            ridged = (change.square() * self._ridge).sum(1, dtype=torch.float64)
            found.append((damped - ridged).clamp_min(0))
            before = count
        return torch.stack(found)

    def alone(self, owned: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """sum_i importance_i (D H D^T)_ii [units] float64 when one unit alone goes and all others are refitted.

        owned [units, width]: the columns of each unit. importance [d] >= 0. With M = A^-1 and B the unit's columns:
        Q = M[B,B]^-1, D = W_B Q M[B,:].
        """
        weighted = self._weight * importance.to(self._weight.dtype).sqrt()[:, None]
        width = owned.shape[1]
        found = []
        for part in self._place[owned].split(max(1, ALONE // width)):
            columns = part.flatten()
            rows = (self._inverse[:, columns].T @ self._inverse).view(len(part), width, -1)  # M[B,:]
            own = rows.gather(2, part[:, None, :].expand(-1, width, -1))  # M[B,B]
            ridged = torch.einsum("uik,k,ujk->uij", rows, self._ridge, rows)
            inverse = torch.cholesky_inverse(factor(own, self._what))  # no batched LU: see `_Alive.costs`
            kernel = inverse - inverse @ ridged @ inverse
            mine = weighted[:, columns].view(-1, len(part), width).movedim(1, 0)  # [units, d, width]
            found.append(torch.einsum("uij,udi,udj->u", kernel, mine, mine).double())
        return torch.cat(found).clamp_min(0)
