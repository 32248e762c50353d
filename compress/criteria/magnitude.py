"""Group magnitude: the L2 norm of everything a unit owns (Han et al. 2015; Fang et al. 2023). No activations."""

from __future__ import annotations

import torch

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = sqrt(sum of squares over all weight slices of unit u)."""
    del damping
    squares = torch.stack([part.square().sum(1) for part in view.owned])
    return ranking_by_score(squares.sum(0).sqrt())
