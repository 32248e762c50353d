"""The joint refit: gate, up and down projection of a pruned FFN moved together towards what the whole FFN gave.

The refit of solve.py moves down_proj alone, for which the outputs are linear. This goes on from there with Gauss-Newton
steps over all three matrices (gauss_newton.py). What goes down, over the calibration tokens t with weights w_t, is

    sum_t w_t |V (act(G x_t) * (U x_t)) - y_t|^2 / sum_t w_t + a ridge towards where each matrix began,

x_t what the FFN reads and y_t what the whole FFN gave for it. All passes are batch by batch: memory is x, y and a few
copies of the three matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from compress.arch import Group
from compress.steps.prune.gauss_newton import (
    Activation,
    Gated,
    Preconditioner,
    Problem,
    Seen,
    Step,
    conjugate_gradients,
    factored,
)

HALVINGS = 3  # of a step that does not lower the error; after them the FFN stays as it was


def gated(tensors: Mapping[str, torch.Tensor], group: Group, units: int) -> Gated:
    """The FFN of a layer's tensors, `units` neurons wide, in float32."""
    places = _places(group, units)
    gate, up = (tensors[name][rows].float() for name, rows in places if name.endswith(".weight"))
    biases = [tensors[name][rows].float() for name, rows in places if name.endswith(".bias")]
    gate_bias, up_bias = biases or (None, None)
    return Gated(gate, up, tensors[f"{group.reader}.weight"].float(), gate_bias, up_bias)


def written(tensors: Mapping[str, torch.Tensor], group: Group, ffn: Gated) -> dict[str, torch.Tensor]:
    """The layer's tensors with the three matrices of `ffn` in the place of their own, in the dtypes that they have."""
    reader = f"{group.reader}.weight"
    new = {**tensors, reader: ffn.down.to(tensors[reader].dtype)}
    places = [place for place in _places(group, len(ffn.gate)) if place[0].endswith(".weight")]
    for (name, rows), value in zip(places, (ffn.gate, ffn.up), strict=True):
        if new[name] is tensors[name]:
            new[name] = tensors[name].clone()
        new[name][rows] = value.to(new[name].dtype)
    return new


def _places(group: Group, units: int) -> list[tuple[str, slice]]:
    """Where gate and up lie, in that order, in a layer that has `units` of the group's neurons: tensor and rows."""
    cuts = [cut for cut in group.cuts if cut.axis == 0]
    starts = [cut.offset // group.units * units for cut in cuts]
    return [(cut.tensor, slice(start, start + units)) for cut, start in zip(cuts, starts, strict=True)]


def activation_of(layer: nn.Module, group: Group) -> Activation:
    """The activation between gate and up in a stock layer: its own, whichever key of the config its class reads."""
    inside = layer.get_submodule(group.reader.rpartition(".")[0])
    found: Activation = next(getattr(inside, name) for name in ("act_fn", "activation_fn") if hasattr(inside, name))
    return found


@contextmanager
def watching(layer: nn.Module, group: Group, seen: Seen) -> Iterator[None]:
    """While open, what the FFN of `layer` reads, and gives without the bias of its last matrix, goes into `seen`,
    window after window."""
    passed = 0

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        seen.inputs[passed : passed + len(args[0])] = args[0]

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal passed
        bias = getattr(module, "bias", None)
        seen.outputs[passed : passed + len(out)] = out if bias is None else out - bias
        passed += len(out)

    first = _places(group, group.units)[0][0].removesuffix(".weight")
    handles = [
        layer.get_submodule(first).register_forward_pre_hook(before),
        layer.get_submodule(group.reader).register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Joint:
    """The FFN that was found; `error_before` and `error`: E|V.. - y|^2 / E|y|^2 of the one given and of this one."""

    ffn: Gated
    error_before: float
    error: float


@torch.no_grad()
def joint_refit(
    ffn: Gated, act: Activation, seen: Seen, gram: torch.Tensor, damping: float, steps: int, device: str, what: str
) -> Joint:
    """`steps` Gauss-Newton steps from `ffn`, each halved while it does not lower the error; in the dtype of `seen`,
    sums in float32. gram [k, k]: E[h h^T] of what down_proj reads. The ridge of every matrix is `damping` times the
    mean of its curvature at the first step. UserError names the module (`what`) if the statistics are singular even
    with damping."""
    start, error_before, error = ffn, 0.0, 0.0
    if not bool(gram.any()):
        return Joint(ffn, 0.0, 0.0)  # it gives zeros: there is nothing to refit by
    ridges: Step | None = None
    for _ in range(steps):
        problem = Problem(ffn, act, seen, device)
        curved = problem.curved()
        if ridges is None:
            ridges, error_before = curved.ridges(damping, gram), curved.error
            outer = factored(gram, float(ridges[2]), what)
        for own, ridge, part, began in zip(curved.gradient, ridges, ffn.matrices, start.matrices, strict=True):
            own -= ridge * (part - began)
        step = conjugate_gradients(problem, curved.gradient, ridges, Preconditioner(curved, damping, outer, what))
        moved, error = _moved(ffn, step, act, seen, curved.error, device)
        if moved is ffn:
            break
        ffn = moved
    return Joint(ffn, error_before, error)


def _moved(ffn: Gated, step: Step, act: Activation, seen: Seen, error: float, device: str) -> tuple[Gated, float]:
    """The FFN after the step, or after half or a quarter of it, whichever is the first to lower the `error` that it
    has, and the error then; the FFN itself, if none does."""
    scale = 1.0
    for _ in range(HALVINGS):
        gate, up, down = (own + scale * part for own, part in zip(ffn.matrices, step, strict=True))
        moved = replace(ffn, gate=gate, up=up, down=down)
        found = Problem(moved, act, seen, device).error()
        if found < error:
            return moved, found
        scale /= 2
    return ffn, error
