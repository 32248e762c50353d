"""What the readers of one layer see of the calibration text, before the layer is cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from compress.arch import Group
from compress.solve import HeldOut, Shift
from compress.steps.prune.enough import windows_back
from compress.steps.prune.gauss_newton import Activation, Seen
from compress.steps.prune.joint import activation_of, watching
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.propagation import Shifting
from compress.steps.prune.weights import held_share
from compress.stream import Statistic
from compress.stream.fed import Fed
from compress.stream.forward import Stream
from compress.stream.statistics import Gathered, gathering

FFN = "ffn"  # the group


@dataclass(frozen=True)
class Inputs:
    """By group: `statistics`, what is wanted of what its reader reads; `held`: the Gram matrix of the held-out windows,
    the last ones. `ffn`, `act`: what the FFN reads and gives, and its activation, where it is refitted jointly;
    `shift`: what is wanted of it besides, where errors propagate."""

    statistics: dict[str, dict[Statistic, torch.Tensor]] = field(default_factory=dict)
    held: dict[str, HeldOut] = field(default_factory=dict)
    ffn: Seen | None = None
    act: Activation | None = None
    shift: Shift | None = None


def look(
    stream: Stream,
    index: int,
    groups: Sequence[Group],
    tensors: Mapping[str, torch.Tensor],
    fed: Fed | None,
    wanted: Collection[Statistic],
    options: PruneOptions,
    dense: torch.Tensor | None,
) -> Inputs:
    """Pass the windows through layer `index` of the stream, filled with `tensors`, for what `groups` need. dense
    [N, L, hidden]: what that layer gave in the dense model, where errors propagate."""
    if not groups or fed is None:
        return Inputs()
    gathered = {g.name: Gathered(wanted, g.units, g.width, stream.device) for g in groups}
    readers = {g.reader: gathered[g.name] for g in groups}
    back = windows_back(options, len(fed))
    first, last = fed.part(0, len(fed) - back), fed.part(len(fed) - back, len(fed))
    kept_back = {g.name: Gathered({"gram"}, g.units, g.width, stream.device) for g in groups if back}
    ffn = next((g for g in groups if g.name == FFN), None)
    act = None
    seen = Seen.room(fed.hidden, fed.weights) if ffn is not None and options.joint_refit else None
    shifting = None
    if ffn is not None and dense is not None:
        shifting = Shifting(fed, dense, options.error_propagation, ffn, stream.device)
    with ExitStack() as stack:
        layer = stack.enter_context(stream.layer_from(index, tensors))
        stack.enter_context(gathering(layer, readers, fed.weights))
        if ffn is not None and seen is not None:
            stack.enter_context(watching(layer, ffn, seen))
            act = activation_of(layer, ffn)
        if shifting is not None:
            stack.enter_context(shifting.watching(layer, seen))
        stream.advance(layer, first.hidden, keep=False, positions=first.positions)
        if back:
            with gathering(layer, {g.reader: kept_back[g.name] for g in groups}, last.weights):
                stream.advance(layer, last.hidden, keep=False, positions=last.positions)
    share = held_share(fed, back)
    held = {name: HeldOut(each.results()["gram"], share) for name, each in kept_back.items()}
    shift = None if shifting is None else shifting.result()
    return Inputs({name: each.results() for name, each in gathered.items()}, held, seen, act, shift)
