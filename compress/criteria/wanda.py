"""Wanda, summed over a unit's columns: weight times input norm (Sun et al. 2024, eq. 1; structured: Wanda-sp)."""

from __future__ import annotations

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = sum over the unit's columns j of ||W[:,j]||^2 E[x_j^2]: the energy the unit alone puts into the output."""
    del damping
    score = view.reader.square().sum(0) * view.statistics["square"]
    return ranking_by_score(score.view(-1, view.width).sum(1))
