"""The diagonal of the empirical Fisher information of a mask over the units (Kwon et al. 2022, section 4.1).

A unit's mask m_u is a factor of its columns in the reader's input; calibration windows are the samples. The gradients
come from one backward pass of the dense model (stream/backward.py).
"""

from __future__ import annotations

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = the mean over the windows of (dL/dm_u)^2 at m = 1, L the window's mean loss: twice the rise of the loss
    that is expected when unit u goes, in a quadratic model without its other terms."""
    del damping
    return ranking_by_score(view.statistics["fisher"])
