"""Elimination, against least squares by numpy in float64 and against exhaustive choice."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from compress import eliminate, solve
from compress.eliminate import Elimination, greedy_removal
from compress.solve import damping_vector, refit
from tests.least_squares import Problem, embedded

GREEDY = 1.25  # greedy removal costs at most this much more than the best choice, on the problems below


def test_greedy_removal_is_near_the_best_choice_of_three_columns() -> None:
    ratios = []
    for seed in range(25):
        problem = Problem(8, seed=seed)
        removal = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=1)
        gone = tuple(removal.order[:3].tolist())
        best = min(problem.cost(choice) for choice in combinations(range(8), 3))
        # what the three cost one after another is what the set costs with all updates made at once
        assert float(removal.cost[:3].sum()) == pytest.approx(problem.cost(gone), rel=1e-3)
        assert problem.cost(gone[:1]) == pytest.approx(min(problem.cost((j,)) for j in range(8)), rel=1e-6)
        ratios.append(problem.cost(gone) / best)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < GREEDY and max(ratios) < 2, ratios
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) > len(ratios) / 2


def test_everything_goes_once_and_costs_what_the_whole_weighs() -> None:
    problem = Problem(12)
    removal = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=1)
    assert sorted(removal.order.tolist()) == list(range(12))
    assert bool((removal.cost > 0).all())
    assert float(removal.cost.sum()) == pytest.approx(problem.cost(tuple(range(12))), rel=1e-4)


def test_float32_elimination_is_that_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(32, seed=3)
    double = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=1)
    monkeypatch.setattr(solve, "DOUBLE_UP_TO", 31)
    single = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=1)
    assert solve.working_dtype(32) == torch.float32
    assert single.order.tolist() == double.order.tolist()
    torch.testing.assert_close(single.cost, double.cost, rtol=1e-3, atol=0)
    assert not torch.equal(single.cost, double.cost)  # float32 was really used


def test_heads_go_whole() -> None:
    width, units = 4, 6
    problem = Problem(width * units, rows=10, seed=4)
    removal = greedy_removal(problem.weight, problem.hessian, problem.ridge, width=width, block=width)
    assert sorted(removal.order.tolist()) == list(range(units))

    def of(heads: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(head * width + j for head in heads for j in range(width))

    alone = {head: problem.cost(of((head,))) for head in range(units)}
    first = min(alone, key=lambda head: alone[head])
    assert int(removal.order[0]) == first
    assert float(removal.cost[0]) == pytest.approx(alone[first], rel=1e-3)
    pair: tuple[int, ...] = tuple(removal.order[:2].tolist())
    assert float(removal.cost[:2].sum()) == pytest.approx(problem.cost(of(pair)), rel=1e-3)
    best = min(problem.cost(of(choice)) for choice in combinations(range(units), 2))
    assert best * (1 - 1e-9) <= problem.cost(of(pair)) < GREEDY * best


def test_a_round_takes_the_cheapest_units_each_at_its_own_cost() -> None:
    problem = Problem(12, seed=5)
    removal = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=4)
    alone = [problem.cost((j,)) for j in range(12)]
    assert removal.order[:4].tolist() == sorted(range(12), key=lambda j: alone[j])[:4]
    np.testing.assert_allclose(removal.cost[:4].numpy(), sorted(alone)[:4], rtol=1e-3)
    # the next round counts what the first four left behind
    gone = tuple(removal.order[:4].tolist())
    added = problem.cost((*gone, int(removal.order[4]))) - problem.cost(gone)
    assert float(removal.cost[4]) == pytest.approx(added, rel=1e-3)


@pytest.fixture
def inversions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of columns of every inverse that is computed from the statistics."""
    sizes: list[int] = []
    original = eliminate._inverse

    def counted(hessian: Any, ridge: Any, columns: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(columns))
        return original(hessian, ridge, columns, *rest)

    monkeypatch.setattr(eliminate, "_inverse", counted)
    return sizes


def test_the_inverse_is_refreshed_and_the_result_stays(inversions: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(20, seed=6)
    plain = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=2)
    assert inversions == [20]
    inversions.clear()
    monkeypatch.setattr(eliminate, "REFRESH", 6)
    fresh = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=2)
    assert inversions == [20, 14, 8, 2]
    assert fresh.order.tolist() == plain.order.tolist()
    torch.testing.assert_close(fresh.cost, plain.cost, rtol=1e-5, atol=0)


@pytest.mark.parametrize("broken", [float("-inf"), float("nan")])
def test_an_impossible_cost_refreshes_the_inverse(
    broken: float, inversions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(10, seed=7)
    expected = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=1)
    inversions.clear()
    original, calls = eliminate._Alive.costs, []

    def third_is_broken(alive: Any) -> torch.Tensor:
        score = original(alive)
        calls.append(len(score))
        return torch.full_like(score, broken) if len(calls) == 3 else score

    monkeypatch.setattr(eliminate._Alive, "costs", third_is_broken)
    found = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=1)
    assert inversions == [10, 8]
    assert found.order.tolist() == expected.order.tolist()


@pytest.mark.parametrize("double_up_to", [4096, 0], ids=["float64", "float32"])
def test_one_factor_gives_the_error_of_every_leading_cut(double_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output by output what the refit of the kept columns leaves, for nested cuts in one order, none and all but one
    included."""
    monkeypatch.setattr(solve, "DOUBLE_UP_TO", double_up_to)
    problem = Problem(24, seed=5)
    going = torch.tensor(np.random.default_rng(1).permutation(24))
    counts = [0, 1, 7, 12, 20, 23]
    found = Elimination(problem.weight, problem.hessian, problem.ridge, going)
    errors = found.leading(counts)
    energy = ((problem.w @ problem.x.T) ** 2).mean(1)
    assert np.allclose(found.energy, energy, rtol=1e-4)
    for count, error in zip(counts, errors, strict=True):
        keep = sorted(going[count:].tolist())
        refitted = refit(problem.weight, problem.hessian, torch.tensor(keep), problem.ridge)
        full = embedded(refitted.weight.double().numpy(), keep, 24)
        assert np.allclose(
            error, (((full - problem.w) @ problem.x.T) ** 2).mean(1), rtol=2e-3, atol=1e-4 * energy.max()
        )
        assert float(error.sum() / found.energy.sum()) == pytest.approx(refitted.error, rel=2e-3, abs=1e-5)
    assert errors[0].max() == 0


@pytest.mark.parametrize("width", [1, 4])
def test_the_error_without_a_unit_is_that_of_the_refit_of_all_others(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eliminate, "ALONE", 8)  # several parts
    problem, importance = Problem(24, seed=6), torch.rand(6, generator=torch.Generator().manual_seed(0))
    owned = torch.arange(24).view(-1, width)
    going = torch.tensor(np.random.default_rng(2).permutation(24))
    found = Elimination(problem.weight, problem.hessian, problem.ridge, going).alone(owned, importance)
    for unit, columns in enumerate(owned.tolist()):
        keep = [column for column in range(24) if column not in columns]
        refitted = refit(problem.weight, problem.hessian, torch.tensor(keep), problem.ridge)
        full = embedded(refitted.weight.double().numpy(), keep, 24)
        error = (((full - problem.w) @ problem.x.T) ** 2).mean(1)
        assert float(found[unit]) == pytest.approx(float(error @ importance.double().numpy()), rel=1e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_a_block_that_is_not_definite_has_no_cost(width: int) -> None:
    """It asks for a new inverse."""
    inverse, ridge = torch.eye(4), torch.zeros(4)
    inverse[2, 2] = -1.0
    costs = eliminate._Alive(torch.ones(3, 4), torch.ones(3, 4), ridge, inverse, width).costs()
    assert costs.isnan().tolist() == [unit == 2 // width for unit in range(4 // width)]
    assert float(costs[0]) == 3 * width


@pytest.mark.parametrize("double_up_to", [4096, 0], ids=["float64", "float32"])
@pytest.mark.parametrize("width", [1, 2])
def test_a_massive_activation_ranks_nobody_by_weight_alone(
    width: int, double_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes the mean of the diagonal, and so the ridge: under H + L dead units would cost what their weights say."""
    monkeypatch.setattr(solve, "DOUBLE_UP_TO", double_up_to)
    problem = Problem(32, rows=10, seed=8)
    problem.x[:, 8:16] = 0  # dead, whatever their weights
    problem.x[::50, 3] += 3000
    problem.weight[:, 8:16] *= 10
    hessian = torch.tensor(problem.x.T @ problem.x / 200, dtype=torch.float32)
    ridge = damping_vector(hessian, 0.01)
    assert float(ridge[0]) > 10 * float(hessian.diagonal().median())
    removal = greedy_removal(problem.weight, hessian, ridge, width=width, block=width, what="module")
    assert sorted(removal.order[: 8 // width].tolist()) == list(range(8 // width, 16 // width))
    share = removal.cost / removal.cost.sum()
    assert float(share[: 8 // width].sum()) < 1e-6
