"""Statistics of a layer's inner activations, gathered by hooks while windows pass through it.

Of each Linear only what was asked for is gathered, where its inputs are, in float32: in bfloat16 a sum of products
would come out rounded. Tokens may have weights w_t: a mean over tokens is then sum_t w_t x_t / sum_t w_t, and a token
of weight 0 is as good as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from compress.stream import Statistic

Weights = torch.Tensor | None  # [windows, L] float32, none negative; None: 1 each


class _Sum(Protocol):
    """One statistic of inputs [windows, L, n] that arrive batch by batch."""

    def add(self, inputs: torch.Tensor, weights: Weights = None) -> None: ...
    def result(self) -> torch.Tensor: ...


def _total(inputs: torch.Tensor, weights: Weights) -> float:
    """The weight of all tokens of a batch [windows, L, n]."""
    return inputs[..., 0].numel() if weights is None else float(weights.sum(dtype=torch.float64))


def _times(values: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Rows [T, n] times the weights [windows, L] of their tokens."""
    return values if weights is None else values * weights.flatten()[:, None]


class Gram:
    """H = X^T X / T [n, n] over the T tokens; with weights, Omega their diagonal: X^T Omega X / sum(Omega)."""

    def __init__(self, units: int, width: int, device: str) -> None:
        columns = units * width
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._tokens = 0.0

    def add(self, inputs: torch.Tensor, weights: Weights = None) -> None:
        flat = _times(inputs.flatten(0, -2), None if weights is None else weights.sqrt())
        self._sum.addmm_(flat.T, flat)
        self._tokens += _total(inputs, weights)

    def result(self) -> torch.Tensor:
        """The sum is scaled in place, because it is the largest thing alive: call it once, when all is added."""
        return self._sum.div_(self._tokens or 1)


class Product:
    """C = Y^T X / T [d, n] and the mean of |y|^2, of inputs X and outputs Y that need not be theirs."""

    def __init__(self, outputs: int, columns: int, device: str) -> None:
        self._product = torch.zeros(outputs, columns, dtype=torch.float32, device=device)
        self._energy = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = 0.0

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, weights: Weights = None) -> None:
        """Add inputs [windows, L, n] and the outputs [windows, L, d] beside them, both float32."""
        flat, other = inputs.flatten(0, -2), outputs.flatten(0, -2)
        self._product.addmm_(_times(other, weights).T, flat)
        self._energy += _times(other.square(), weights).sum(dtype=torch.float64)
        self._tokens += _total(inputs, weights)

    def result(self) -> tuple[torch.Tensor, float]:
        """C, E|y|^2; call it once, when all is added."""
        tokens = self._tokens or 1
        return self._product.div_(tokens), float(self._energy) / tokens


class Cross:
    """H = X^T X / T [n, n], C = Y^T X / T [d, n] and the mean of |y|^2, of the inputs X and the wanted outputs Y."""

    def __init__(self, outputs: int, columns: int, device: str) -> None:
        self._gram, self._product = Gram(columns, 1, device), Product(outputs, columns, device)

    def add(self, inputs: torch.Tensor, wanted: torch.Tensor, weights: Weights = None) -> None:
        """Add inputs [windows, L, n] and what is wanted for them [windows, L, d], both float32."""
        self._gram.add(inputs, weights)
        self._product.add(inputs, wanted, weights)

    def result(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """H, C, E|y|^2; call it once, when all is added."""
        return self._gram.result(), *self._product.result()


class Square:
    """The mean square of every column [n]: the diagonal of H."""

    def __init__(self, units: int, width: int, device: str) -> None:
        self._sum = torch.zeros(units * width, dtype=torch.float64, device=device)
        self._tokens = 0.0

    def add(self, inputs: torch.Tensor, weights: Weights = None) -> None:
        self._sum += _times(inputs.flatten(0, -2).square(), weights).sum(0)
        self._tokens += _total(inputs, weights)

    def result(self) -> torch.Tensor:
        return (self._sum / (self._tokens or 1)).float()


class Variance:
    """The variance of every column over the tokens [n].

    Not H_jj - mean_j^2, which loses the variance of a column that is far from zero to rounding: each batch is centred,
    and the batches are merged (Chan, Golub & LeVeque 1983, eq. 2.1).
    """

    def __init__(self, units: int, width: int, device: str) -> None:
        self._mean, self._squares = torch.zeros(2, units * width, dtype=torch.float64, device=device).unbind()
        self._tokens = 0.0

    def add(self, inputs: torch.Tensor, weights: Weights = None) -> None:
        flat, own = inputs.flatten(0, -2), _total(inputs, weights)
        if not own:
            return
        before, total = self._tokens, self._tokens + own
        mean = flat.mean(0) if weights is None else _times(flat, weights / own).sum(0)
        apart = mean.double() - self._mean
        self._squares += _times((flat - mean).square_(), weights).sum(0) + apart.square() * (before * own / total)
        self._mean += apart * (own / total)
        self._tokens = total

    def result(self) -> torch.Tensor:
        return (self._squares / (self._tokens or 1)).float()


class Activity:
    """How strongly every unit speaks [units]: the L2 norm of its columns at each token, its mean over a window's
    tokens, and the root mean square of that over the windows; a window weighs what its tokens weigh together."""

    def __init__(self, units: int, width: int, device: str) -> None:
        self._units, self._width = units, width
        self._sum = torch.zeros(units, dtype=torch.float64, device=device)
        self._windows = 0.0

    def add(self, inputs: torch.Tensor, weights: Weights = None) -> None:
        if self._width == 1:
            norms = inputs.abs()
        else:
            norms = torch.linalg.vector_norm(inputs.unflatten(-1, (self._units, self._width)), dim=-1)
        if weights is None:
            self._sum += norms.mean(1).square().sum(0)
            self._windows += len(inputs)
            return
        own = weights.sum(1, keepdim=True)
        shares = weights / own.where(own > 0, 1.0)
        self._sum += ((norms * shares[..., None]).sum(1).square() * own).sum(0)
        self._windows += float(own.sum(dtype=torch.float64))

    def result(self) -> torch.Tensor:
        return (self._sum / (self._windows or 1)).sqrt().float()


KINDS: dict[Statistic, Callable[[int, int, str], _Sum]] = {
    "gram": Gram,
    "square": Square,
    "variance": Variance,
    "activity": Activity,
}


class Gathered:
    """The `wanted` statistics of what one Linear reads: inputs [windows, L, units*width], `width` columns a unit."""

    def __init__(self, wanted: Collection[Statistic], units: int, width: int, device: str = "cpu") -> None:
        self._wanted = wanted
        # the squares stand on the diagonal of a Gram matrix
        kinds = [kind for kind in KINDS if kind in wanted and not (kind == "square" and "gram" in wanted)]
        self._sums = {kind: KINDS[kind](units, width, device) for kind in kinds}

    def add(self, inputs: torch.Tensor, weights: Weights = None) -> None:
        """Add inputs [windows, L, n] of any float dtype, and what their tokens weigh; whole windows."""
        wide = inputs.detach().float()
        for each in self._sums.values():
            each.add(wide, weights)

    def results(self) -> dict[Statistic, torch.Tensor]:
        """What was wanted, float32 on the device; call it once, when all is added."""
        found = {kind: each.result() for kind, each in self._sums.items()}
        if "square" in self._wanted and "gram" in found:
            found["square"] = found["gram"].diagonal()
        return found


@contextmanager
def gathering(layer: nn.Module, readers: Mapping[str, Gathered], weights: Weights = None) -> Iterator[None]:
    """While open, the inputs of the named Linears of `layer` are gathered. `weights` [N, L]: of the tokens of all
    windows that pass while it is open, in their order."""

    def hook(gathered: Gathered):  # type: ignore[no-untyped-def]
        passed = 0

        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            del module
            nonlocal passed
            batch = None if weights is None else weights[passed : passed + len(args[0])].to(args[0].device)
            gathered.add(args[0], batch)
            passed += len(args[0])

        return add

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(found)) for name, found in readers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
