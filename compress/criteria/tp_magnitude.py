"""Torch-Pruning's GroupMagnitudeImportance (Fang et al. 2023, DepGraph): its own code, on the group that its own graph
finds (steps/prune/coupled.py).

With its defaults: the mean over the coupled matrices of the sum of squares, over the mean of all units. So it ranks as
`magnitude` does, but for biases, which it leaves out.
"""

from __future__ import annotations

from typing import Any

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = the mean over the unit's columns of what Torch-Pruning says of each."""
    del damping
    return ranking_by_score(view.statistics["tp_magnitude"])


def importance(normalizer: str | None = "mean") -> Any:
    """Torch-Pruning's function of a group."""
    import torch_pruning

    return torch_pruning.importance.GroupMagnitudeImportance(normalizer=normalizer)
