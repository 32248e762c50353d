"""Cutting units out of a layer's tensors, and choosing which ones stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.arch import Group
from compress.criteria import GroupView, Ranking


def select(ranking: Ranking, group: Group, keep: int) -> torch.Tensor:
    """Indices of the units that stay [keep], ascending: every balance block loses its first ones in the order."""
    blocks = group.units // group.balance
    gone_per_block = (group.units - keep) // blocks
    stay = torch.ones(group.units, dtype=torch.bool, device=ranking.order.device)
    for block in range(blocks):
        members = ranking.order[ranking.order // group.balance == block]
        stay[members[:gone_per_block]] = False
    return stay.nonzero().flatten()


def columns(units: torch.Tensor, width: int, offset: int = 0) -> torch.Tensor:
    """The indices that `units` own along a cut's axis."""
    return (offset + units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def cut(tensors: Mapping[str, torch.Tensor], group: Group, keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """All tensors of a layer with only the kept units of `group`; tensors the group does not own are passed on."""
    new = dict(tensors)
    for name in {c.tensor for c in group.cuts}:
        mine = [c for c in group.cuts if c.tensor == name]
        index = torch.cat([columns(keep, c.width, c.offset) for c in mine])
        new[name] = tensors[name].index_select(mine[0].axis, index)
    return new


def view(tensors: Mapping[str, torch.Tensor], group: Group, hessian: torch.Tensor | None, name: str) -> GroupView:
    """What a criterion sees of one group of a layer, in float32."""
    owned = []
    for c in group.cuts:
        part = tensors[c.tensor].narrow(c.axis, c.offset, group.units * c.width).float()
        owned.append(part.movedim(c.axis, 0).reshape(group.units, -1))
    reader = tensors[f"{group.reader}.weight"].float()
    return GroupView(name=name, width=group.width, reader=reader, hessian=hessian, owned=tuple(owned))
