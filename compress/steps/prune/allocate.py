"""Which widths cost least: units against units, layers against layers, from measured cost curves. numpy only.

The predicted rise of the loss is taken to be the sum of what every (layer, group) loses alone. `cheapest` then solves a
multiple-choice knapsack exactly, by dynamic programming over the parameters removed: curves need not be convex.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from compress.steps.prune.decoder import Decoder, Keeps, own, width_multiple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

At = tuple[int, str]  # (layer, group)
MOST = 0.75  # of the units of a group that may go from one layer
CELLS = 2**16  # of the table at most; where parameters would need more, they are counted in larger, rounded-down cells


class CostCurve(Protocol):
    """compress.curves.Curve: removed units [m], ascending from 0, and the predicted rise of the loss by them [m]."""

    @property
    def removed(self) -> npt.NDArray[np.int64]: ...

    def at(self, removed: float) -> float:
        """The loss of so many units, in nats a token."""


@dataclass(frozen=True)
class Choice:
    """What one group of one layer may keep: units that stay, parameters that go, and the predicted loss of it."""

    keep: tuple[int, ...]
    gone: tuple[int, ...]
    loss: tuple[float, ...]


def uncovered(keeps: Keeps, decoder: Decoder, curves: Mapping[At, CostCurve]) -> At | None:
    """The first (layer, group) from which more units go than its curve reaches."""
    for index, keep in enumerate(keeps):
        for name, kept in keep.items():
            if own(decoder.layers[index], name) - kept > int(curves[index, name].removed[-1]):
                return index, name
    return None


def choices(decoder: Decoder, curves: Mapping[At, CostCurve], free: Iterable[At], heads: set[int]) -> dict[At, Choice]:
    """What every group of `free` may keep, and the matrix parameters that go. heads: counts that a loader takes.

    FFN widths are multiples of `width_multiple`, heads of the KV heads; at most MOST of the units go, and no more than
    the curve reaches.
    """
    multiple = width_multiple(decoder.sizes.hidden)
    found = {}
    for index, name in free:
        layer, curve = decoder.layers[index], curves[index, name]
        group = layer.groups[name]
        step = multiple if name == "ffn" else group.units // group.balance
        most = min(int(MOST * group.units), int(curve.removed[-1]))
        keep = [n for n in range(step, group.units, step) if group.units - n <= most and (name == "ffn" or n in heads)]
        keep = [group.units, *reversed(keep)]
        gone = [(group.units - n) * layer.weight(name) for n in keep]
        found[index, name] = Choice(tuple(keep), tuple(gone), tuple(curve.at(group.units - n) for n in keep))
    return found


def cheapest(options: Sequence[Choice], need: int) -> list[int] | None:
    """One index into each of `options`: at least `need` parameters go, at the least summed loss; None if they cannot.

    Exact where all parameters are multiples of a common divisor that needs at most CELLS cells; else what goes is
    counted too low by less than one cell a choice. Of equal losses the first is taken: less removed.
    """
    import numpy as np

    if need <= 0:
        return [0] * len(options)
    cell = math.gcd(*(gone for each in options for gone in each.gone if gone)) if options else 0
    if not cell:
        return None
    cell = max(cell, -(-need // CELLS))
    cells = -(-need // cell)
    best = np.full(cells + 1, np.inf)  # by parameters removed in cells; the last one: all that are needed, or more
    best[0] = 0.0
    taken = np.zeros((len(options), cells + 1), dtype=np.int32)
    came = np.zeros((len(options), cells + 1), dtype=np.int32)
    places = np.arange(cells + 1)
    for row, each in enumerate(options):
        new = np.full(cells + 1, np.inf)
        for index, (gone, loss) in enumerate(zip(each.gone, each.loss, strict=True)):
            width = min(gone // cell, cells)
            moved = best[: cells + 1 - width] + loss
            target = new[width:]
            better = moved < target
            target[better] = moved[better]
            taken[row, width:][better] = index
            came[row, width:][better] = places[: cells + 1 - width][better]
            if width:  # what goes beyond the need
                beyond = int(np.argmin(best[cells + 1 - width :])) + cells + 1 - width
                if best[beyond] + loss < new[cells]:
                    new[cells], taken[row, cells], came[row, cells] = best[beyond] + loss, index, beyond
        best = new
    if not np.isfinite(best[cells]):
        return None
    picked, place = [0] * len(options), cells
    for row in reversed(range(len(options))):
        picked[row], place = int(taken[row, place]), int(came[row, place])
    return picked


def allocate(decoder: Decoder, base: Keeps, options: Mapping[At, Choice], over: Callable[[Keeps], int]) -> Keeps | None:
    """The widths of least predicted loss within a budget; None where all that may go is not enough.

    base: what stays of every group that is not in `options`. over: parameters by which a model is beyond the budget, 0
    or less when it is within. It is asked again after each allocation, because biases and file headers count there.
    """
    keys = list(options)
    keeps, need = base, over(base)
    for _ in range(10):
        picked = cheapest([options[key] for key in keys], need)
        if picked is None:
            return None
        chosen = {key: options[key].keep[index] for key, index in zip(keys, picked, strict=True)}
        keeps = tuple(
            {name: chosen.get((index, name), kept) for name, kept in keep.items()} for index, keep in enumerate(base)
        )
        beyond = over(keeps)
        if beyond <= 0:
            return keeps
        need += beyond
    return None


def smallest(base: Keeps, options: Mapping[At, Choice]) -> Keeps:
    """What is left when as much goes as may."""
    return tuple(
        {name: options[index, name].keep[-1] if (index, name) in options else kept for name, kept in keep.items()}
        for index, keep in enumerate(base)
    )
