"""Which blocks of a vision tower go: what goes into and comes out of every block is compared, patch by patch, as it is
token by token for decoder layers (depth.py). One image after the other, hooks on the blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import pi
from typing import Any

import torch
from torch import nn

from compress.errors import UserError
from compress.limits import DEPTH_POSITIONS


class _Scores:
    """Of the blocks `blocks`, `gone` of which go, over `images` images."""

    def __init__(self, blocks: Sequence[nn.Module], gone: int, images: int) -> None:
        self.blocks, self.gone, self.images = blocks, gone, images
        self.totals: torch.Tensor
        self.patches = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, what passes through the blocks is looked at; `seen` is called after every image."""

        def hook(index: int):  # type: ignore[no-untyped-def]
            def see(module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
                del module
                self.passed(index, args[0], out if isinstance(out, torch.Tensor) else out[0])

            return see

        handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @abstractmethod
    def passed(self, index: int, given: torch.Tensor, made: torch.Tensor) -> None:
        """Block `index` made patches `made` [patches, hidden] of `given`."""

    def seen(self) -> None:
        """An image has passed through all blocks."""

    @abstractmethod
    def result(self) -> tuple[list[int], list[float]]:
        """The blocks that stay, ascending, and the scores; UserError where activations are NaN or infinite."""

    def means(self) -> list[float]:
        """The totals, over all patches."""
        found: list[float] = (self.totals / max(self.patches, 1)).tolist()
        for index, score in enumerate(found):
            if score - score != 0:
                raise UserError(f"vision layer {index}: its input or output is NaN or infinite: activations overflow")
        return found


class Angular(_Scores):
    """The block of `gone` neighbours whose input and output are the closest (Gromov et al. 2024, arXiv:2403.17887).

    Eq. 3-4 over patches: d(l) = arccos(x_l . x_{l+n} / |x_l| |x_{l+n}|) / pi, and the n neighbours with the least d go.
    An image gives as many patches as fit in DEPTH_POSITIONS, evenly spaced: a patch attends to all others, so none has
    seen more than another.
    """

    def __init__(self, blocks: Sequence[nn.Module], gone: int, images: int) -> None:
        super().__init__(blocks, gone, images)
        self.totals = torch.zeros(len(blocks) - gone + 1, dtype=torch.float64)
        self._each = max(1, DEPTH_POSITIONS // images)
        self._states: list[torch.Tensor] = []

    def passed(self, index: int, given: torch.Tensor, made: torch.Tensor) -> None:
        if index == 0:
            self._states = [self._part(given)]
        self._states.append(self._part(made))

    def _part(self, state: torch.Tensor) -> torch.Tensor:
        count = min(self._each, len(state))
        return state[torch.arange(count) * len(state) // count].float()

    def seen(self) -> None:
        for first in range(len(self.totals)):
            angle = _cosine(self._states[first], self._states[first + self.gone]).clamp(-1, 1).arccos()
            self.totals[first] += float(angle.sum(dtype=torch.float64)) / pi
        self.patches += len(self._states[0])
        self._states = []

    def result(self) -> tuple[list[int], list[float]]:
        found = self.means()
        first = min(range(len(found)), key=found.__getitem__)
        return [index for index in range(len(self.blocks)) if not first <= index < first + self.gone], found


class Influence(_Scores):
    """The `gone` blocks of least Block Influence (Men et al. 2024, ShortGPT, arXiv:2403.03853, eq. 1), over all
    patches: 1 - E[x . y / |x| |y|], x what goes into a block and y what comes out."""

    def __init__(self, blocks: Sequence[nn.Module], gone: int, images: int) -> None:
        super().__init__(blocks, gone, images)
        self.totals = torch.zeros(len(blocks), dtype=torch.float64)

    def passed(self, index: int, given: torch.Tensor, made: torch.Tensor) -> None:
        self.totals[index] += float((1 - _cosine(given.float(), made.float())).sum(dtype=torch.float64))
        self.patches += len(given) if index == 0 else 0

    def result(self) -> tuple[list[int], list[float]]:
        found = self.means()
        order = sorted(range(len(self.blocks)), key=found.__getitem__)
        return sorted(order[self.gone :]), found


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # their lengths first: the square of a massive activation overflows sooner than the activation
    return (nn.functional.normalize(one, dim=-1) * nn.functional.normalize(other, dim=-1)).sum(-1)


METHODS: dict[str, type[_Scores]] = {"angular": Angular, "influence": Influence}
