"""FLAP's WIFV: how far a unit's columns fluctuate around their mean, times their weights (An et al. 2024, eq. 5).

What does not fluctuate puts out a constant, which a bias could replace; stock decoders have no such bias, so FLAP's
compensation is left out, and the refit, if there is one, stands in for it.
"""

from __future__ import annotations

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = sum over the unit's columns j of ||W[:,j]||^2 Var[x_j]: the energy the unit puts out besides a constant.

    The paper's sum for heads as well; its authors' code squares the terms of a head before it adds them.
    """
    del damping
    score = view.reader.square().sum(0) * view.statistics["variance"]
    return ranking_by_score(score.view(-1, view.width).sum(1))
