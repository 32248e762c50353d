"""Allocation from cost curves against exhaustive search: the least predicted loss within the budget, or none."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from compress.steps.prune import allocate
from compress.steps.prune.allocate import Choice, cheapest


def drawn(rng: np.random.Generator, convex: bool) -> Choice:
    """Some widths of one group, with a loss that rises: convex or not."""
    count, weight = int(rng.integers(2, 5)), int(rng.choice([6, 10, 15, 40]))
    rises = rng.random(count)
    loss = np.concatenate([[0.0], np.cumsum(np.sort(rises) if convex else rises)])
    return Choice(tuple(range(count, -1, -1)), tuple(weight * n for n in range(count + 1)), tuple(loss.tolist()))


def exhaustive(options: list[Choice], need: int) -> float:
    """The least loss of all combinations that take away enough."""
    return min(
        (
            sum(each.loss[i] for each, i in zip(options, picked, strict=True))
            for picked in product(*(range(len(each.keep)) for each in options))
            if sum(each.gone[i] for each, i in zip(options, picked, strict=True)) >= need
        ),
        default=float("inf"),
    )


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_of_all_combinations(seed: int, convex: bool) -> None:
    rng = np.random.default_rng(seed)
    options = [drawn(rng, convex) for _ in range(5)]
    most = sum(each.gone[-1] for each in options)
    for need in (0, 1, most // 5, most // 2, most - 7, most):
        picked = cheapest(options, need)
        assert picked is not None
        assert sum(each.gone[i] for each, i in zip(options, picked, strict=True)) >= need
        found = sum(each.loss[i] for each, i in zip(options, picked, strict=True))
        assert found == pytest.approx(exhaustive(options, need), rel=1e-12)
    assert cheapest(options, most + 1) is None


def test_coarse_cells_stay_within_the_budget_and_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    options = [drawn(rng, True) for _ in range(6)]
    need = sum(each.gone[-1] for each in options) // 3
    monkeypatch.setattr(allocate, "CELLS", 40)
    picked = cheapest(options, need)
    assert picked is not None
    assert sum(each.gone[i] for each, i in zip(options, picked, strict=True)) >= need
    found = sum(each.loss[i] for each, i in zip(options, picked, strict=True))
    assert found <= exhaustive(options, need + 30)
