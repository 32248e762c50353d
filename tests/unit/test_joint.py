"""The joint refit of a gated FFN: its gradient and Gauss-Newton products against autograd, and what it gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import jvp, vjp

from compress.errors import UserError
from compress.steps.prune import gauss_newton
from compress.steps.prune.gauss_newton import Gated, Preconditioner, Problem, Seen, conjugate_gradients, factored
from compress.steps.prune.joint import joint_refit

H, N, K, TOKENS = 6, 20, 12, (8, 16)  # hidden, whole width, kept width, windows x tokens


def act(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x)


def apply(ffn: Gated, x: torch.Tensor) -> torch.Tensor:
    gate = x @ ffn.gate.T + (0 if ffn.gate_bias is None else ffn.gate_bias)
    up = x @ ffn.up.T + (0 if ffn.up_bias is None else ffn.up_bias)
    return (act(gate) * up) @ ffn.down.T


def problem(biases: bool = False, weighted: bool = False, seed: int = 0) -> tuple[Gated, Seen]:
    """An FFN cut to its first neurons, and what the whole one read and gave."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    whole = Gated(normal(N, H), normal(N, H), normal(H, N), *([normal(N), normal(N)] if biases else []))
    x = normal(*TOKENS, H)
    weights = torch.rand(TOKENS, generator=generator) if weighted else None
    cut = Gated(whole.gate[:K], whole.up[:K], whole.down[:, :K])
    if whole.gate_bias is not None and whole.up_bias is not None:
        cut = replace(cut, gate_bias=whole.gate_bias[:K], up_bias=whole.up_bias[:K])
    return cut, Seen(x, apply(whole, x), weights)


def gram_of(ffn: Gated, seen: Seen) -> torch.Tensor:
    inside = apply(replace(ffn, down=torch.eye(K)), seen.inputs).flatten(0, 1)
    weight = torch.ones(len(inside)) if seen.weights is None else seen.weights.flatten()
    return (inside * weight[:, None]).T @ inside / weight.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_gradient_and_products_are_those_of_autograd(
    biases: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauss_newton, "JOINT_BYTES", 0 if biases else 2**20)  # the inside made anew, or kept
    ffn, seen = problem(biases, weighted)
    at = Problem(ffn, act, seen, "cpu")
    curved = at.curved()
    ridges = curved.ridges(0.01, gram_of(ffn, seen))

    def outputs(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return apply(replace(ffn, gate=gate, up=up, down=down), seen.inputs)

    weight = torch.ones(TOKENS) if seen.weights is None else seen.weights
    share = (weight / weight.sum())[..., None]
    start = (ffn.gate, ffn.up, ffn.down)
    out, back = vjp(outputs, *start)
    left = seen.outputs - out
    for mine, theirs in zip(curved.gradient, back(share * left), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert curved.error == pytest.approx(float((share * left.square()).sum() / (share * seen.outputs.square()).sum()))
    step = tuple(torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) for each in start)
    _, moved = jvp(outputs, start, step)
    for mine, theirs, ridge, part in zip(at.times(step, ridges), back(share * moved), ridges, step, strict=True):
        torch.testing.assert_close(mine, theirs + ridge * part, rtol=1e-4, atol=1e-5)


def test_enough_iterations_solve_the_linear_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauss_newton, "JOINT_ITERATIONS", 400)
    ffn, seen = problem()
    at, gram = Problem(ffn, act, seen, "cpu"), gram_of(ffn, seen)
    curved = at.curved()
    ridges = curved.ridges(0.1, gram)
    wanted = [each.clone() for each in curved.gradient]
    made = Preconditioner(curved, 0.1, factored(gram, float(ridges[2]), "ffn"), "ffn")
    found = at.times(conjugate_gradients(at, curved.gradient, ridges, made), ridges)
    scale = max(float(each.abs().max()) for each in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("seed", range(4))
def test_it_lowers_the_error_that_the_refit_of_down_leaves(seed: int) -> None:
    ffn, seen = problem(seed=seed)
    inside = apply(replace(ffn, down=torch.eye(K)), seen.inputs).flatten(0, 1)
    best = torch.linalg.lstsq(inside, seen.outputs.flatten(0, 1)).solution.T
    start = replace(ffn, down=best)
    found = joint_refit(start, act, seen, gram_of(start, seen), 0.01, 1, "cpu", "layer 0 ffn")
    more = joint_refit(start, act, seen, gram_of(start, seen), 0.01, 3, "cpu", "layer 0 ffn")
    assert more.error < found.error and more.error_before == found.error_before
    assert found.error < 0.9 * found.error_before

    def measured(at: Gated) -> float:
        return float((apply(at, seen.inputs) - seen.outputs).square().sum() / seen.outputs.square().sum())

    assert found.error_before == pytest.approx(measured(start), rel=1e-4)
    assert found.error == pytest.approx(measured(found.ffn), rel=1e-4)


def test_what_is_seen_in_float16_is_multiplied_in_float32() -> None:
    ffn, seen = problem()
    narrow = Seen(100 * seen.inputs.half(), seen.outputs.half())  # sums over its tokens are beyond 65,504
    wide = Seen(narrow.inputs.float(), narrow.outputs.float())
    found, expected = (Problem(ffn, act, each, "cpu").curved() for each in (narrow, wide))
    assert all(torch.equal(a, b) for a, b in zip(found.gradient, expected.gradient, strict=True))
    assert max(float(each.abs().max()) for each in expected.gradient) > 65504
    assert found.error == expected.error


def test_a_whole_ffn_and_a_silent_one_stay_as_they_are() -> None:
    ffn, seen = problem()
    exact = Seen(seen.inputs, apply(ffn, seen.inputs), None)
    found = joint_refit(ffn, act, exact, gram_of(ffn, exact), 0.01, 2, "cpu", "ffn")
    assert found.error <= found.error_before < 1e-12
    silent = Seen(seen.inputs, torch.zeros_like(seen.outputs), None)
    zero = replace(ffn, down=torch.zeros_like(ffn.down))
    assert joint_refit(zero, act, silent, gram_of(ffn, seen), 0.01, 2, "cpu", "ffn").ffn is zero


def test_singular_statistics_name_the_module() -> None:
    ffn, seen = problem()
    with pytest.raises(UserError, match="layer 3 ffn: the activation statistics are singular"):
        joint_refit(ffn, act, seen, torch.ones(K, K), 0.0, 2, "cpu", "layer 3 ffn")
    nothing = joint_refit(ffn, act, seen, torch.zeros(K, K), 0.01, 2, "cpu", "ffn")  # it gives zeros: no fault
    assert nothing.ffn is ffn and nothing.error == 0
