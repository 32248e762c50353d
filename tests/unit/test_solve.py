"""The linear algebra of pruning, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress import solve
from compress.eliminate import greedy_removal
from compress.errors import UserError
from compress.limits import DAMPINGS
from compress.solve import HeldOut, best_damping, cut_error, damping_vector, factor, refit, refit_to
from tests.least_squares import Problem, embedded


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
