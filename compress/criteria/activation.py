"""Minitron: how large a unit's activations are, whatever reads them (Muralidharan et al. 2024, section 2.2).

For a neuron its activation, for a head its output before o_proj; aggregated as the paper found best: the mean over a
window's tokens, the L2 norm over the windows.
"""

from __future__ import annotations

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = root mean square over the windows of the mean over the tokens of ||x_u||, x_u the unit's columns."""
    del damping
    return ranking_by_score(view.statistics["activity"])
