"""The linear algebra of pruning, against numpy in float64 and against exhaustive choice."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compress import solve
from compress.errors import UserError
from compress.limits import DAMPINGS
from compress.solve import (
    Elimination,
    HeldOut,
    best_damping,
    cut_error,
    damping_vector,
    factor,
    greedy_removal,
    refit,
    refit_to,
)

Array = npt.NDArray[np.float64]
GREEDY = 1.25  # greedy removal costs at most this much more than the best choice, on the problems below


class Problem:
    """Weights W [d, n], correlated inputs X [T, n] of uneven size, H = X^T X / T and a ridge of uneven entries."""

    def __init__(self, columns: int, *, rows: int = 6, tokens: int = 200, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        mixing = np.eye(columns) + 0.4 * random.standard_normal((columns, columns))
        sizes = np.exp(0.5 * random.standard_normal(columns))
        self.x: Array = (random.standard_normal((tokens, columns)) @ mixing * sizes).astype(np.float32).astype(float)
        self.w: Array = random.standard_normal((rows, columns)).astype(np.float32).astype(float)
        self.weight = torch.tensor(self.w, dtype=torch.float32)
        self.hessian = torch.tensor(self.x.T @ self.x / tokens, dtype=torch.float32)
        self.ridge = damping_vector(self.hessian, 0.01) * torch.linspace(0.5, 1.5, columns)
        # rows of the augmented system: ||A v||^2 = v^T (H + L) v
        self.rows: Array = np.concatenate([self.x / tokens**0.5, np.diag(self.ridge.double().sqrt().numpy())])

    def error(self, weight: Array) -> float:
        """||V X - W X||^2 / ||W X||^2."""
        return float(((weight - self.w) @ self.x.T).__pow__(2).sum() / ((self.w @ self.x.T) ** 2).sum())

    def cost(self, gone: tuple[int, ...]) -> float:
        """||D X||^2 / T of the D that removes the columns `gone` (D = -W there) at the least ||D A^T||^2."""
        stay, scaled = [j for j in range(self.w.shape[1]) if j not in gone], self.x / len(self.x) ** 0.5
        lost = self.rows[:, list(gone)] @ self.w[:, list(gone)].T
        update = np.linalg.lstsq(self.rows[:, stay], lost, rcond=None)[0]
        return float(((scaled[:, stay] @ update - scaled[:, list(gone)] @ self.w[:, list(gone)].T) ** 2).sum())


def embedded(kept: npt.NDArray[Any], keep: list[int], columns: int) -> Array:
    """Weights [d, k] of the kept columns at their places in [d, columns]."""
    full = np.zeros((len(kept), columns))
    full[:, keep] = kept
    return full


@pytest.mark.parametrize("double_up_to", [4096, 0], ids=["float64", "float32"])
def test_refit_is_the_ridge_solution(double_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "DOUBLE_UP_TO", double_up_to)
    problem = Problem(24, seed=1)
    keep = [0, 1, 4, 5, 7, 9, 12, 13, 14, 18, 20, 23]
    found = refit(problem.weight, problem.hessian, torch.tensor(keep), problem.ridge)
    # min_V ||V X_K - W X||^2 / T + ||(V - W_K) L^(1/2)||^2 as one least-squares problem
    roots = np.diag(problem.ridge.double().sqrt().numpy())[np.ix_(keep, keep)]
    scaled = problem.x / len(problem.x) ** 0.5
    left = np.concatenate([scaled[:, keep], roots])
    right = np.concatenate([scaled @ problem.w.T, roots @ problem.w[:, keep].T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-3, atol=2e-4 if double_up_to == 0 else 2e-5)
    assert found.weight.dtype == torch.float32 and found.weight.is_contiguous()
    assert found.error == pytest.approx(problem.error(embedded(expected, keep, 24)), rel=1e-4)
    assert found.error_before == pytest.approx(problem.error(embedded(problem.w[:, keep], keep, 24)), rel=1e-4)
    assert 0 < found.error < found.error_before


def test_refit_of_all_columns_changes_nothing() -> None:
    problem = Problem(16)
    found = refit(problem.weight, problem.hessian, torch.arange(16), problem.ridge)
    torch.testing.assert_close(found.weight, problem.weight, rtol=1e-4, atol=1e-5)
    assert found.error == pytest.approx(0, abs=1e-6) and found.error_before == pytest.approx(0, abs=1e-6)


def test_a_large_ridge_holds_the_weights_and_a_small_one_lets_them_go() -> None:
    problem, keep = Problem(16), torch.arange(8)
    held = refit(problem.weight, problem.hessian, keep, torch.full((16,), 1e6))
    torch.testing.assert_close(held.weight, problem.weight[:, :8], rtol=1e-3, atol=1e-3)
    free = refit(problem.weight, problem.hessian, keep, torch.full((16,), 1e-6))
    assert free.error < held.error
    free_again = np.linalg.lstsq(problem.x[:, :8], problem.x @ problem.w.T, rcond=None)[0].T
    assert free.error == pytest.approx(problem.error(embedded(free_again, list(range(8)), 16)), rel=1e-3)


def test_cut_error_is_the_error_of_the_output() -> None:
    problem, keep = Problem(16, seed=2), [0, 3, 4, 8, 9, 15]
    expected = problem.error(embedded(problem.w[:, keep], keep, 16))
    assert cut_error(problem.weight, problem.hessian, torch.tensor(keep)) == pytest.approx(expected, rel=1e-4)
    assert cut_error(torch.zeros(2, 4), torch.eye(4), torch.tensor([0, 1])) == 0.0


def test_held_out_windows_choose_the_damping_that_is_best_on_them() -> None:
    tokens, kept_back = 40, 10  # few tokens for 24 columns: the least damping is not the best
    problem, keep = Problem(24, tokens=tokens, seed=3), [*range(0, 24, 2)]
    fit, held = problem.x[:-kept_back], problem.x[-kept_back:]
    errors = {}
    for damping in DAMPINGS:
        ridge = damping * (fit**2).mean() * np.eye(len(keep))
        system = fit[:, keep].T @ fit[:, keep] / len(fit) + ridge
        weight = np.linalg.solve(
            system, (problem.w @ (fit.T @ fit[:, keep] / len(fit)) + problem.w[:, keep] @ ridge).T
        ).T
        lost = (held[:, keep] @ weight.T - held @ problem.w.T) ** 2
        errors[damping] = lost.sum() / ((held @ problem.w.T) ** 2).sum()
    best = min(errors, key=lambda damping: errors[damping])
    assert DAMPINGS[0] < best < DAMPINGS[-1]
    gram = torch.tensor(held.T @ held / kept_back, dtype=torch.float32)
    found = best_damping(problem.weight, problem.hessian, torch.tensor(keep), HeldOut(gram, kept_back / tokens))
    assert found[0] == best
    assert found[1] == pytest.approx(errors[best], rel=1e-3)


def test_damping_is_relative_to_the_mean_of_the_diagonal() -> None:
    hessian = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    torch.testing.assert_close(damping_vector(hessian, 0.1), torch.full((3,), 0.3))


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
    original = solve._inverse

    def counted(hessian: Any, ridge: Any, columns: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(columns))
        return original(hessian, ridge, columns, *rest)

    monkeypatch.setattr(solve, "_inverse", counted)
    return sizes


def test_the_inverse_is_refreshed_and_the_result_stays(inversions: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(20, seed=6)
    plain = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=2)
    assert inversions == [20]
    inversions.clear()
    monkeypatch.setattr(solve, "REFRESH", 6)
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
    original, calls = solve._Alive.costs, []

    def third_is_broken(alive: Any) -> torch.Tensor:
        score = original(alive)
        calls.append(len(score))
        return torch.full_like(score, broken) if len(calls) == 3 else score

    monkeypatch.setattr(solve._Alive, "costs", third_is_broken)
    found = greedy_removal(problem.weight, problem.hessian, problem.ridge, block=1)
    assert inversions == [10, 8]
    assert found.order.tolist() == expected.order.tolist()


@pytest.mark.parametrize("double_up_to", [4096, 0], ids=["float64", "float32"])
def test_singular_statistics_are_refused_by_name(double_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "DOUBLE_UP_TO", double_up_to)
    weight, twins = torch.ones(3, 8), torch.ones(8, 8)  # columns that are all the same
    ridge = damping_vector(twins, 1e-30)  # lost beside them
    said = "layer 3 ffn: the activation statistics are singular even with damping"
    with pytest.raises(UserError, match=said) as caught:
        refit(weight, twins, torch.arange(4), ridge, "layer 3 ffn")
    assert caught.value.hint is not None and "--damping" in caught.value.hint
    with pytest.raises(UserError, match=said):
        greedy_removal(weight, twins, ridge, what="layer 3 ffn")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("double_up_to", [4096, 0], ids=["float64", "float32"])
def test_statistics_that_are_no_numbers_are_not_called_singular(
    double_up_to: int, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "DOUBLE_UP_TO", double_up_to)
    problem, said = Problem(8), "layer 3 ffn: activations are NaN or infinite"
    for place in ((2, 2), (7, 1)):  # one that stays, one that goes
        hessian = problem.hessian.clone()
        hessian[place] = wrong
        with pytest.raises(UserError, match=said):
            refit(problem.weight, hessian, torch.arange(4), problem.ridge, "layer 3 ffn")
    hessian = torch.full((8, 8), wrong)
    with pytest.raises(UserError, match=said):
        greedy_removal(problem.weight, hessian, damping_vector(hessian, 0.01), what="layer 3 ffn")
    with pytest.raises(UserError, match=said):
        refit_to(problem.weight, hessian, torch.ones(6, 8), 1.0, damping_vector(hessian, 0.01), "layer 3 ffn")


def test_inputs_that_are_all_zero_leave_the_weights_as_they_are() -> None:
    problem, keep, dead = Problem(8), torch.tensor([0, 3, 4]), torch.zeros(8, 8)
    ridge = damping_vector(dead, 0.01)
    found = refit(problem.weight, dead, keep, ridge)
    assert torch.equal(found.weight, problem.weight[:, keep]) and found.error == found.error_before == 0
    removal = greedy_removal(problem.weight, dead, ridge, block=1)
    assert sorted(removal.order.tolist()) == list(range(8)) and not bool(removal.cost.any())
    assert best_damping(problem.weight, dead, keep, HeldOut(dead, 0.25)) == (DAMPINGS[0], 0)
    assert torch.equal(refit_to(problem.weight, dead, torch.zeros(6, 8), 0.0, ridge, "module").weight, problem.weight)


def test_a_factor_that_fails_in_float32_is_taken_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tall = torch.randn(30, 24, generator=generator)
        matrix = tall @ tall.T + 2e-6 * torch.eye(30)  # rank 24 of 30, and a ridge at the edge of float32
        if int(torch.linalg.cholesky_ex(matrix)[1]) and not int(torch.linalg.cholesky_ex(matrix.double())[1]):
            lower = factor(matrix, "module")
            assert lower.dtype == torch.float32
            torch.testing.assert_close(lower @ lower.T, matrix, rtol=1e-4, atol=1e-4)
            return
    pytest.fail("no matrix of 200 that float32 cannot factor and float64 can")


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
    monkeypatch.setattr(solve, "ALONE", 8)  # several parts
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
    costs = solve._Alive(torch.ones(3, 4), torch.ones(3, 4), ridge, inverse, width).costs()
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
