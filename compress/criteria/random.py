"""Units in a random order, the same for the same seed: a control, for what a criterion gains over none."""

from __future__ import annotations

import numpy as np
import torch

from compress.criteria import GroupView, Ranking, ranking_by_score


def rank(view: GroupView, damping: float) -> Ranking:
    """s_u = u's place in a permutation drawn from `view.seed`, from 1, divided by the number of units."""
    del damping
    units = view.reader.shape[1] // view.width
    place = np.random.Generator(np.random.PCG64(list(view.seed))).permutation(units)
    return ranking_by_score(torch.from_numpy((place + 1) / units).float().to(view.reader.device))
