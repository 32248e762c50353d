"""LLM-Pruner's first-order salience: how far the loss moves when a weight goes, summed over all weights of a unit
(Ma et al. 2023, section 3.2: element-wise importance without its second-order term, summed over the group).

The gradient of the mean loss comes from one backward pass of the dense model (stream/backward.py).
"""

from __future__ import annotations

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = sum of |w dL/dw| over all that goes with unit u: a neuron's rows of gate and up and column of down_proj; a
    head's rows of q_proj and columns of o_proj (not of k_proj and v_proj, which heads share and which stay); and their
    biases."""
    del damping
    return ranking_by_score(view.statistics["taylor"])
