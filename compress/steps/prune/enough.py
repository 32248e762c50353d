"""Whether the calibration is enough for what is made of it: tokens a column, windows that can be kept back.

A plan asks where headers and options tell, the step where only its windows do: all of a text, or padding among them.
"""

from __future__ import annotations

from collections.abc import Collection

from compress.arch.kv import KV_HEADS
from compress.criteria import CRITERIA
from compress.data import BUILTIN
from compress.errors import UserError
from compress.limits import ENOUGH
from compress.steps.prune.decoder import Decoder, Keeps, own
from compress.steps.prune.options import DROP, PruneOptions
from compress.steps.types import Complain, PlanContext

# benchmarks.md: SmolLM2 so calibrated stands at 2.47 times dense on WikiText-2, and at 1.93 with `self`
DOCUMENTATION = "calibrated on builtin, documentation of Python alone: text like the task's, or half self, keeps more"


def few_tokens(tokens: int, columns: int, besides: str = "") -> UserError | None:
    """What is wrong with fewer tokens than a Gram matrix has columns; None where there are as many. `besides`: which
    tokens do not count."""
    if tokens >= columns:
        return None
    return UserError(
        f"{tokens} calibration tokens{besides} for a Gram matrix of {columns} columns: {tokens / columns:.2f} a "
        "column, and under 1 it is singular",
        hint=f"give more samples ({ENOUGH} tokens a column or more), or force: true (--force)",
    )


def windows_back(options: PruneOptions, windows: int) -> int:
    """How many of the windows are kept back to choose damping on, the last ones; UserError for none, or all of them."""
    if options.held_out is None or not options.refit:
        return 0
    back = round(options.held_out * windows)
    if not 0 < back < windows:
        raise UserError(f"{options.held_out} of {windows} calibration windows is none, or all of them")
    return back


def check_held_out(options: PruneOptions, windows: int) -> None:
    """The same, for windows that no plan could count: UserError names the key, before anything is computed."""
    try:
        windows_back(options, windows)
    except UserError as problem:
        raise UserError(f"held_out: {problem.message}") from None


def held_notes(options: PruneOptions, losing: Collection[str], tower: bool, complain: Complain) -> list[str]:
    """Which refits `held_out` says nothing of; a complaint where it says nothing of any. `losing`: groups of the
    decoder that lose units, `tower`: whether neurons of the vision merger go."""
    if options.held_out is None:
        return []
    merged = KV_HEADS in losing and options.kv_merge != DROP
    if not options.refit:
        complain("held_out", "chooses the damping of refits, which refit: false leaves out")
    elif not (losing or tower):
        complain("held_out", "chooses the damping of refits, and no units go: there are none")
    elif merged and set(losing) == {KV_HEADS} and not tower:
        complain("held_out", "not for o_proj of merged KV heads, which is all that is refitted here")
    return ["held_out: not for o_proj of merged KV heads, whose damping is as given"] if merged else []


def refit_notes(
    options: PruneOptions, decoder: Decoder, keep: Keeps, context: PlanContext, complain: Complain
) -> list[str]:
    """How many calibration tokens there are for every column of the widest Gram matrix (T/n); a complaint under 1."""
    data = context.data["calibration"]
    refitted = [
        layer.sizes.ffn for layer, each in zip(decoder.layers, keep, strict=True) if each["ffn"] < own(layer, "ffn")
    ]
    heads = any(each["heads"] < own(layer, "heads") for layer, each in zip(decoder.layers, keep, strict=True))
    merged = bool(decoder.kv) and options.refit
    if not (refitted or heads or merged):
        return []
    read = decoder.most_heads.heads * decoder.most_heads.head_dim if heads or merged else 0  # by o_proj
    widest = max([*refitted, read])
    if not options.refit and (options.from_sensitivity is not None or "gram" not in CRITERIA[options.criterion].needs):
        return []
    if data.samples is None:
        return []
    try:
        windows_back(options, data.samples)
    except UserError as problem:
        complain("held_out", problem.message, problem.hint)
    tokens = data.samples * data.length
    if not options.force and (few := few_tokens(tokens, widest)) is not None:
        complain("", few.message, few.hint)
    what = "refit" if options.refit else "ranking"
    note = f"{what}: {tokens / widest:.1f} calibration tokens per column"
    note += f" (under {ENOUGH}: the {what} will be poor; give more samples)" if tokens < ENOUGH * widest else ""
    return [note, *([DOCUMENTATION] if data.source == BUILTIN else [])]
