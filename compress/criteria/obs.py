"""Optimal brain surgeon: units go one block after another, the others take over (Hassibi & Stork 1993; ZipLM 2023)."""

from __future__ import annotations

import torch

from compress.criteria import GroupView, Ranking
from compress.eliminate import greedy_removal
from compress.solve import damping_vector


def rank(view: GroupView, damping: float) -> Ranking:
    """Order of elimination; cost_u = the error unit u added when it went, after the others' best update."""
    hessian = view.statistics["gram"]
    ridge = damping_vector(hessian, damping)
    # 16 columns a round; at 9 B, 32: the traffic of a round is the whole inverse
    block = 16 if view.reader.shape[1] <= 4096 else 32
    removal = greedy_removal(view.reader, hessian, ridge, width=view.width, block=block, what=view.name)
    cost = torch.empty_like(removal.cost)
    cost[removal.order] = removal.cost
    return Ranking(removal.order, cost)
