"""Distillation losses: zero for a model with itself, gradients against finite differences, bounded tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch.utils._python_dispatch import TorchDispatchMode

from compress.losses import LOSSES, forward_kl

SHAPE = {"tokens": 7, "vocab": 23, "hidden": 5}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles both ways, the last ones smaller."""
    monkeypatch.setattr(forward_kl, "TOKENS", 3)
    monkeypatch.setattr(forward_kl, "ROWS", 8)


def case(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """Student hidden and head, teacher hidden and head; the teacher is wider."""
    generator = torch.Generator().manual_seed(seed)
    t, v, h = SHAPE["tokens"], SHAPE["vocab"], SHAPE["hidden"]
    shapes = [(t, h), (v, h), (t, h + 2), (v, h + 2)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [value.requires_grad_(index < 2) for index, value in enumerate(values)]


def plain(sh: torch.Tensor, sw: torch.Tensor, th: torch.Tensor, tw: torch.Tensor, temperature: float) -> torch.Tensor:
    student = (sh @ sw.T / temperature).log_softmax(-1)
    teacher = (th @ tw.T / temperature).log_softmax(-1)
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_model_with_itself_is_zero_with_zero_gradient(
    name: str, compute: torch.dtype | None, temperature: float
) -> None:
    hidden, head = (value.detach().requires_grad_() for value in case(torch.float32)[:2])
    loss = LOSSES[name].load()(hidden, head, hidden.detach(), head.detach(), temperature=temperature, compute=compute)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and head.grad is not None
    assert not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_of_finite_differences(name: str, temperature: float) -> None:
    loss = LOSSES[name].load()
    hidden, head, theirs, their_head = case()

    def value(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return loss(a, b, theirs, their_head, temperature=temperature)

    assert torch.autograd.gradcheck(value, (hidden, head))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_forward_kl_is_torchs(temperature: float) -> None:
    ours, theirs = case(), case()
    loss = forward_kl.forward_kl(*ours, temperature=temperature)
    expected = plain(*theirs, temperature)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


def test_logits_far_from_zero_neither_overflow_nor_vanish() -> None:
    ours = case(torch.float32)
    scaled = [(value.detach() * 60).requires_grad_(value.requires_grad) for value in ours]
    loss = forward_kl.forward_kl(*scaled)
    loss.backward()
    expected = plain(*(value.detach().double() for value in scaled), 1.0)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(value.grad).all() for value in scaled[:2] if value.grad is not None)


def test_a_frozen_head_and_the_teacher_get_no_gradient() -> None:
    hidden, head, theirs, their_head = case()
    head.requires_grad_(False)
    theirs.requires_grad_()
    forward_kl.forward_kl(hidden, head, theirs, their_head).backward()
    assert hidden.grad is not None and head.grad is None and theirs.grad is None


def test_bf16_products_stay_near_float32() -> None:
    exact, rounded = case(torch.float32), case(torch.float32)
    a = forward_kl.forward_kl(*exact)
    b = forward_kl.forward_kl(*rounded, compute=torch.bfloat16)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.01)
    assert exact[1].grad is not None and rounded[1].grad is not None
    assert (exact[1].grad - rounded[1].grad).norm() < 0.03 * exact[1].grad.norm()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation inside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return made


def test_logits_of_all_tokens_and_rows_are_never_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab, hidden = 64, 512, 4
    monkeypatch.setattr(forward_kl, "TOKENS", 16)
    monkeypatch.setattr(forward_kl, "ROWS", 32)
    head = torch.randn(vocab, hidden, requires_grad=True)
    states = torch.randn(tokens, hidden, requires_grad=True)
    with Largest() as largest:
        forward_kl.forward_kl(states, head, torch.randn(tokens, hidden), torch.randn(vocab, hidden)).backward()
    assert 0 < largest.numel <= vocab * hidden < tokens * vocab
    with Largest() as whole:
        plain(states, head, states.detach(), head.detach(), 1.0)
    assert whole.numel == tokens * vocab, "the measure does not see whole logits"


def test_another_vocabulary_is_refused() -> None:
    hidden, head, theirs, their_head = case()
    with pytest.raises(ValueError, match="same tokens and vocabulary"):
        forward_kl.forward_kl(hidden, head, theirs, their_head[:-1])
