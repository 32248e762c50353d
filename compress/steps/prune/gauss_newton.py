"""Gauss-Newton steps for a gated FFN against the outputs that are wanted of it (Nocedal & Wright 2006, section 10.3).

The linear system of a step is solved by a few conjugate gradients (algorithm 5.3) under a Kronecker-factored
preconditioner (as Martens & Grosse 2015, eq. 9). All passes over the tokens are batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from compress.limits import BATCH_TOKENS, JOINT_BYTES, JOINT_ITERATIONS
from compress.solve import factor, working_dtype

Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # a change of gate, up and down, or a gradient
Activation = Callable[[torch.Tensor], torch.Tensor]
FLOOR = 1e-3  # share of the mean curvature that a neuron has at least, in the preconditioner


@dataclass(frozen=True)
class Gated:
    """y = down (act(gate x + gate_bias) * (up x + up_bias)): gate, up [k, h], down [d, k] float32, biases [k]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None

    @property
    def matrices(self) -> Step:
        """Gate, up and down."""
        return self.gate, self.up, self.down


@dataclass(frozen=True)
class Seen:
    """x [N, L, h] and y [N, L, d] of an FFN, in the machine's own memory, and the weights [N, L] of the tokens."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    weights: torch.Tensor | None = None

    @staticmethod
    def room(hidden: torch.Tensor, weights: torch.Tensor | None) -> Seen:
        """Room for what an FFN reads and gives when `hidden` [N, L, h] passes through its layer."""
        return Seen(torch.empty_like(hidden), torch.empty_like(hidden), weights)

    @property
    def dtype(self) -> torch.dtype:
        """What products are taken in: sums over tokens overflow in float16, so that is float32."""
        return torch.float32 if self.inputs.dtype == torch.float16 else self.inputs.dtype

    def total(self) -> float:
        """The weight of all tokens."""
        if self.weights is None:
            return float(self.inputs[..., 0].numel())
        return float(self.weights.sum(dtype=torch.float64))

    def batches(self, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """x [T, h], y [T, d] and weights [T, 1] of a few windows at a time, on the device."""
        step = max(1, BATCH_TOKENS // self.inputs.shape[1])
        for start in range(0, len(self.inputs), step):
            here = slice(start, start + step)
            x, y = (part[here].to(device, self.dtype).flatten(0, 1) for part in (self.inputs, self.outputs))
            weight = None if self.weights is None else self.weights[here].to(device).flatten()[:, None]
            yield x, y, weight


@dataclass(frozen=True)
class Curved:
    """What is known at one FFN: `gradient`, minus half of the squared error's; the relative `error`; `inner` [h, h] =
    E[x x^T]; `strength` [2, k]: the curvature of a row of gate, of up, over `inner`."""

    gradient: Step
    error: float
    inner: torch.Tensor
    strength: torch.Tensor

    def ridges(self, damping: float, gram: torch.Tensor) -> Step:
        """Of gate and up [k, 1], one a row, and of down []."""
        gate, up = damping * self.inner.diagonal().mean() * self.strength[..., None]
        return gate, up, damping * gram.diagonal().mean()


class Problem:
    """The outputs of one FFN against what is wanted: the error, its gradient, and the Gauss-Newton matrix."""

    def __init__(self, ffn: Gated, act: Activation, seen: Seen, device: str) -> None:
        self.ffn, self.act, self.seen, self.device = ffn, act, seen, device
        self.tokens = seen.total() or 1.0
        dtype = seen.dtype
        self._gate, self._up, self._down = (each.to(dtype) for each in (ffn.gate, ffn.up, ffn.down))
        biases = (ffn.gate_bias, ffn.up_bias)
        self._biases = [None if each is None else each.to(dtype) for each in biases]
        inside = 3 * seen.inputs[..., 0].numel() * len(ffn.gate) * dtype.itemsize
        self._keeping = inside <= JOINT_BYTES
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def _inside(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dh/d(gate x), dh/d(up x) and h [T, k], of the inputs x [T, h]."""
        g, u = linear(x, self._gate, self._biases[0]), linear(x, self._up, self._biases[1])
        with torch.enable_grad():
            g.requires_grad_()
            s = self.act(g)
            (slope,) = torch.autograd.grad(s.sum(), g)
        s = s.detach()
        return slope.mul_(u), s, s * u

    def error(self) -> float:
        """E|V h - y|^2 / E|y|^2."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, y, weight in self.seen.batches(self.device):
            g, u = linear(x, self._gate, self._biases[0]), linear(x, self._up, self._biases[1])
            self._compare(sums, linear(self.act(g) * u, self._down), y, weight)
        return _share(sums)

    def curved(self) -> Curved:
        """The gradient at the FFN, and the curvatures there."""
        found, hidden = self._zeros(), self.ffn.gate.shape[1]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        inner = torch.zeros(hidden, hidden, device=self.device)
        slopes = torch.zeros(2, len(self.ffn.gate), device=self.device)
        for x, y, weight in self.seen.batches(self.device):
            by_gate, by_up, h = inside = self._inside(x)
            if self._keeping:
                self._kept.append(inside)
            left = self._compare(sums, linear(h, self._down), y, weight)
            self._back(found, _weighted(left, weight).to(x.dtype), x, by_gate, by_up, h)
            for row, slope in zip(slopes, (by_gate, by_up), strict=True):
                row += _weighted(slope.float().square(), weight).sum(0)
            wide = x.float() if weight is None else x.float() * weight.sqrt()
            inner.addmm_(wide.T, wide)
        inner /= self.tokens
        strength = slopes.div_(self.tokens) * self.ffn.down.square().sum(0)
        return Curved(self._mean(found), _share(sums), inner, strength)

    def times(self, step: Step, ridges: Step) -> Step:
        """The Gauss-Newton matrix, with the ridges, times a step."""
        found = self._zeros()
        gate, up, down = (part.to(self._gate.dtype) for part in step)
        for index, (x, _, weight) in enumerate(self.seen.batches(self.device)):
            by_gate, by_up, h = self._kept[index] if self._keeping else self._inside(x)
            inside = (by_gate * linear(x, gate)).addcmul_(by_up, linear(x, up))
            moved = linear(inside, self._down) + linear(h, down)
            self._back(found, _weighted(moved, weight).to(x.dtype), x, by_gate, by_up, h)
        mean = self._mean(found)
        for own, ridge, part in zip(mean, ridges, step, strict=True):
            own += ridge * part
        return mean

    def _compare(
        self, sums: torch.Tensor, out: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """wanted - out [T, d] in float32; adds the square of it, and of what is wanted, to the two sums."""
        wide = wanted.float()
        left = wide - out.float()
        for at, each in enumerate((left, wide)):
            sums[at] += _weighted(each.square(), weight).sum(dtype=torch.float64)
        return left

    def _back(
        self,
        found: Step,
        left: torch.Tensor,
        x: torch.Tensor,
        by_gate: torch.Tensor,
        by_up: torch.Tensor,
        h: torch.Tensor,
    ) -> None:
        """Add to `found` what changes of the outputs [T, d] are as changes of the three matrices; of gate and up
        transposed, because a product is faster with its short factor in front, in rows."""
        inside, short = left @ self._down, x.T.contiguous()
        found[0].add_(short @ (inside * by_gate))
        found[1].add_(short @ (inside * by_up))
        found[2].add_(left.T.contiguous() @ h)

    def _zeros(self) -> Step:
        """Room for what `_back` adds up."""
        gate, up, down = (torch.zeros_like(each) for each in (self.ffn.gate.T, self.ffn.up.T, self.ffn.down))
        return gate.contiguous(), up.contiguous(), down

    def _mean(self, found: Step) -> Step:
        gate, up, down = (each.div_(self.tokens) for each in found)
        return gate.T.contiguous(), up.T.contiguous(), down


class Preconditioner:
    """The inverse of a block-diagonal stand-in: rows of gate and up as curvature x E[x x^T], down as E[h h^T]."""

    def __init__(self, curved: Curved, damping: float, outer: torch.Tensor, what: str) -> None:
        self._outer = outer  # the factor of E[h h^T], damped
        self._inner = factored(curved.inner, damping * float(curved.inner.diagonal().mean()), what)
        floor = FLOOR * curved.strength.mean(1, keepdim=True)
        self._rows = (curved.strength + floor).clamp_min(torch.finfo(torch.float32).tiny)

    def __call__(self, left: Step) -> Step:
        gate, up = (_right(left[i], self._inner) / self._rows[i][:, None] for i in (0, 1))
        return gate, up, _right(left[2], self._outer)


def factored(gram: torch.Tensor, ridge: float, what: str) -> torch.Tensor:
    system = gram.to(working_dtype(len(gram)))
    system = system.clone() if system is gram else system
    system.diagonal().add_(ridge)
    return factor(system, what)


def _right(left: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """left (L L^T)^-1."""
    return torch.cholesky_solve(left.to(lower.dtype).T, lower).T.float()


def conjugate_gradients(problem: Problem, left: Step, ridges: Step, precondition: Preconditioner) -> Step:
    """The step whose product with the Gauss-Newton matrix is `left`, after JOINT_ITERATIONS iterations; `left` becomes
    what is left of it."""
    gate, up, down = (torch.zeros_like(each) for each in left)
    found: Step = (gate, up, down)
    direction = ready = precondition(left)
    size = _dot(left, ready)
    for iteration in range(JOINT_ITERATIONS):
        product = problem.times(direction, ridges)
        curvature = _dot(direction, product)
        if not (size > 0 and curvature > 0):
            break  # nothing is left to gain
        _add(found, direction, size / curvature)
        if iteration + 1 == JOINT_ITERATIONS:
            break
        _add(left, product, -size / curvature)
        del product
        ready = precondition(left)
        before, size = size, _dot(left, ready)
        for own, new in zip(direction, ready, strict=True):
            own.mul_(size / before).add_(new)
    return found


def _add(to: Step, what: Step, times: float) -> None:
    for own, each in zip(to, what, strict=True):
        own.add_(each, alpha=times)


def _dot(a: Step, b: Step) -> float:
    return sum(float((x * y).sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))


def _share(sums: torch.Tensor) -> float:
    off, energy = sums.tolist()
    return off / energy if energy > 0 else 0.0


def _weighted(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Rows [T, n] times the weights [T, 1] of their tokens."""
    return values if weight is None else values * weight
