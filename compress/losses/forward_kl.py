"""Forward Kullback-Leibler divergence KL(teacher || student) on logits, in tiles of tokens x vocabulary rows.

For a vocabulary of 151,552 the float32 logits of 2,048 tokens are 1.2 GB for each model, and training needs several
copies. Here no tile is larger than `TOKENS` x `ROWS`: the first pass keeps a running log-sum-exp per token, the
second, in backward, makes each tile's logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

# 8 MB a float32 tile: in cache, the passes over it cost a fifth of those over whole logits (measured, two cores)
TOKENS = 2048
ROWS = 1024


def forward_kl(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    temperature: float = 1.0,
    compute: torch.dtype | None = None,
) -> torch.Tensor:
    """T^2 * mean over tokens of sum_v p_v (log p_v - log q_v), p = softmax(teacher / T), q = softmax(student / T).

    Shapes: hidden states [tokens, h], heads [vocab, h]. The factor T^2 keeps the gradient's size when the temperature
    changes (Hinton, Vinyals, Dean 2015, section 2). See `LossFunction` for dtypes and what gets a gradient.
    Raises ValueError where tokens or vocabularies differ.
    """
    if student_hidden.shape[0] != teacher_hidden.shape[0] or student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student [{student_hidden.shape[0]} tokens, vocabulary {student_head.shape[0]}] and teacher "
            f"[{teacher_hidden.shape[0]}, {teacher_head.shape[0]}] must have the same tokens and vocabulary"
        )
    dtype = compute or student_hidden.dtype
    with torch.autocast(student_hidden.device.type, enabled=False):  # `compute` says it, not the context
        value = _ForwardKL.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach(), temperature, dtype
        )
    return cast(torch.Tensor, value)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        exact = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        parts = []
        for block in _spans(student_hidden.shape[0], TOKENS):
            pair = (student_hidden[block].to(dtype), teacher_hidden[block].to(dtype))
            parts.append(_statistics(pair, student_head, teacher_head, temperature, exact))
        student_lse, teacher_lse, cross = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(student_hidden, student_head, teacher_hidden, teacher_head, student_lse, teacher_lse)
        ctx.temperature, ctx.dtype = temperature, dtype
        # sum_v p (log p - log q) = sum_v p (t - s) - (lse_t - lse_s), t and s the logits over the temperature
        return (cross - (teacher_lse - student_lse)).mean() * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student_hidden, student_head, teacher_hidden, teacher_head, student_lse, teacher_lse = ctx.saved_tensors
        dtype, temperature, exact = ctx.dtype, ctx.temperature, student_lse.dtype
        hidden_gradient = torch.zeros_like(student_hidden, dtype=exact)
        head_gradient = torch.zeros_like(student_head, dtype=exact) if ctx.needs_input_grad[1] else None
        for block in _spans(student_hidden.shape[0], TOKENS):
            student, teacher = student_hidden[block].to(dtype), teacher_hidden[block].to(dtype)
            for rows in _spans(student_head.shape[0], ROWS):
                weight = student_head[rows].to(dtype)
                q = _logits(student, weight, temperature, exact).sub_(student_lse[block, None]).exp_()
                p = _logits(teacher, teacher_head[rows].to(dtype), temperature, exact)
                # q - p lies in [-1, 1]: safe to round to `dtype`; the scale follows after the product
                slope = q.sub_(p.sub_(teacher_lse[block, None]).exp_()).to(dtype)
                hidden_gradient[block] += slope @ weight
                if head_gradient is not None:
                    head_gradient[rows] += slope.T @ student
        scale = gradients[0] * temperature / student_hidden.shape[0]  # T^2 from the loss, 1/T from the logits
        hidden_gradient *= scale
        if head_gradient is not None:
            head_gradient *= scale
            head_gradient = head_gradient.to(student_head.dtype)
        return hidden_gradient.to(student_hidden.dtype), head_gradient, None, None, None, None


def _statistics(
    hidden: tuple[torch.Tensor, torch.Tensor],
    student_head: torch.Tensor,
    teacher_head: torch.Tensor,
    temperature: float,
    exact: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token [T]: log-sum-exp of the student's logits, of the teacher's, and sum_v p_v (t_v - s_v)."""
    empty = torch.zeros(hidden[0].shape[0], dtype=exact, device=hidden[0].device)
    student_max, teacher_max = (torch.full_like(empty, -torch.inf) for _ in range(2))
    student_sum, teacher_sum, cross = (empty.clone() for _ in range(3))
    for rows in _spans(student_head.shape[0], ROWS):
        s = _logits(hidden[0], student_head[rows].to(hidden[0].dtype), temperature, exact)
        t = _logits(hidden[1], teacher_head[rows].to(hidden[1].dtype), temperature, exact)
        top = torch.maximum(student_max, s.amax(1))
        other = torch.maximum(teacher_max, t.amax(1))
        student_sum *= (student_max - top).exp_()
        shrink = (teacher_max - other).exp_()
        student_max, teacher_max = top, other
        difference = t - s
        student_sum += s.sub_(top[:, None]).exp_().sum(1)
        weight = t.sub_(other[:, None]).exp_()
        teacher_sum = teacher_sum * shrink + weight.sum(1)
        cross = cross * shrink + weight.mul_(difference).sum(1)
    return student_max + student_sum.log(), teacher_max + teacher_sum.log(), cross / teacher_sum


def _logits(hidden: torch.Tensor, rows: torch.Tensor, temperature: float, exact: torch.dtype) -> torch.Tensor:
    return (hidden @ rows.T).to(exact, copy=True).div_(temperature)


def _spans(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
