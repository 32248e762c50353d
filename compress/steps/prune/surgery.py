"""Cutting units out of a layer's tensors, and choosing which ones stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.arch import Group
from compress.checkpoint.reader import finite
from compress.criteria import GroupView, Ranking
from compress.errors import UserError
from compress.stream import Statistic


def select(ranking: Ranking, group: Group, keep: int, dropped: int = 0) -> torch.Tensor:
    """Indices of the units that stay [keep], ascending: every balance block loses its first ones in the order, but for
    `dropped` blocks that go as a whole: those whose units cost the least together."""
    blocks = group.units // group.balance
    gone_per_block = group.balance - keep // (blocks - dropped)
    cost = ranking.cost.view(blocks, group.balance).sum(1, dtype=torch.float64)
    whole = set(torch.argsort(cost, stable=True)[:dropped].cpu().tolist())
    stay = torch.ones(group.units, dtype=torch.bool, device=ranking.order.device)
    for block in range(blocks):
        members = ranking.order[ranking.order // group.balance == block]
        stay[members if block in whole else members[:gone_per_block]] = False
    return stay.nonzero().flatten()


def columns(units: torch.Tensor, width: int, offset: int = 0) -> torch.Tensor:
    """The indices that `units` own along a cut's axis."""
    return (offset + units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def cut(tensors: Mapping[str, torch.Tensor], group: Group, keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """All tensors of a layer with only the kept units of `group`. What the group does not own is passed on: other
    tensors, and rows of a fused matrix beside its own (k and v behind the queries)."""
    new = dict(tensors)
    for name in {c.tensor for c in group.cuts}:
        mine = [c for c in group.cuts if c.tensor == name]
        axis = mine[0].axis
        stays = torch.ones(tensors[name].shape[axis], dtype=torch.bool, device=keep.device)
        for c in mine:
            stays[c.offset : c.offset + group.units * c.width] = False
            stays[columns(keep, c.width, c.offset)] = True
        new[name] = tensors[name].index_select(axis, stays.nonzero().flatten())
    return new


def check_range(name: str, value: torch.Tensor) -> None:
    """UserError where a tensor of the result holds what its dtype has no number for."""
    if value.is_floating_point() and not finite(value):
        short = str(value.dtype).removeprefix("torch.")
        raise UserError(
            f"tensor '{name}': what the refit gives it overflows {short} (ends at {torch.finfo(value.dtype).max:.6g})",
            hint="raise --damping, or prune a bfloat16 or float32 copy of the model",
        )


def view(
    tensors: Mapping[str, torch.Tensor],
    group: Group,
    statistics: Mapping[Statistic, torch.Tensor] | None,
    name: str,
    seed: tuple[int, ...] = (0,),
) -> GroupView:
    """What a criterion sees of one group of a layer, in float32."""
    owned = []
    for c in group.cuts:
        part = tensors[c.tensor].narrow(c.axis, c.offset, group.units * c.width).float()
        owned.append(part.movedim(c.axis, 0).reshape(group.units, -1))
    reader = tensors[f"{group.reader}.weight"].float()
    return GroupView(
        name=name, width=group.width, reader=reader, owned=tuple(owned), statistics=statistics or {}, seed=seed
    )
