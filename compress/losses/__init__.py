"""Distillation losses: how far the student's next-token distribution is from the teacher's. One file each.

To add one: `losses/mine.py` with a function of the shape of `LossFunction`, and one entry in `LOSSES`. Names and
papers are known without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import torch


class LossFunction(Protocol):
    """Mean loss over T tokens, a scalar; zero, with zero gradient, where both models give the same logits.

    Hidden states [T, h] are what the output matrix [vocab, h] is multiplied with; student and teacher may differ in
    h, not in vocab. `compute` is the dtype of the matrix products; everything else is float32 (float64 where the
    student's hidden states are). Gradients go to the student's hidden states and head only. Logits of all tokens and
    all of the vocabulary are never alive at once.
    """

    def __call__(
        self,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        *,
        temperature: float = 1.0,
        compute: torch.dtype | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Loss:
    """One entry of the table; `load` imports torch and returns the function."""

    name: str
    paper: str
    load: Callable[[], LossFunction]


def _from(module: str, function: str) -> Callable[[], LossFunction]:
    return lambda: cast(LossFunction, getattr(import_module(f"compress.losses.{module}"), function))


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            "forward-kl",
            "Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531",
            _from("forward_kl", "forward_kl"),
        ),
    )
}
