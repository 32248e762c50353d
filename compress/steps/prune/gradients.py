"""What some criteria need of the whole dense model (a backward pass, or Torch-Pruning's graph): over which windows, by
which stream, and the numbers as a run's state.

It is taken once, before a layer is cut: a gradient at one layer depends on all the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compress.arch import Group
from compress.steps.prune.coupled import scored
from compress.steps.prune.options import PruneOptions
from compress.steps.types import Job
from compress.stream import GRADIENTS, WHOLE, Statistic
from compress.stream.backward import Found, gradients
from compress.stream.forward import Stream
from compress.stream.vision import Sight

PREFIX = "gradients."


def gathered(
    job: Job,
    options: PruneOptions,
    stream: Stream,
    ids: torch.Tensor,
    groups: Sequence[Sequence[Group]],
    needs: frozenset[Statistic],
    sight: Sight,
) -> Found:
    """What of `needs` takes a backward pass of the dense model, or the whole of it in memory, for every layer; nothing
    of any where none does."""
    # calibration windows are in seeded order: the first ones are as good as any
    part = ids[: options.gradient_samples]
    if needs & WHOLE and any(groups):
        return scored(job, part, groups, needs)
    wanted = needs & GRADIENTS
    if not wanted or not any(groups):
        return [{} for _ in groups]
    seen = sight.first(len(part))
    return gradients(stream, part, groups, wanted, scratch=job.target.parent, progress=job.progress, sight=seen)


def tensors(found: Found) -> dict[str, torch.Tensor]:
    """`gradients.LAYER.GROUP.STATISTIC` [units]."""
    return {
        f"{PREFIX}{index}.{group}.{kind}": value
        for index, layer in enumerate(found)
        for group, kinds in layer.items()
        for kind, value in kinds.items()
    }


def restored(state: Mapping[str, torch.Tensor], layers: int) -> Found:
    """What `tensors` was made from, out of a state that holds other tensors as well."""
    found: Found = [{} for _ in range(layers)]
    for name, value in state.items():
        if name.startswith(PREFIX):
            index, group, kind = name.removeprefix(PREFIX).split(".")
            found[int(index)].setdefault(group, {})[kind] = value  # type: ignore[index]  # a Statistic, as it was saved
    return found
