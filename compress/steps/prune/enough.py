"""Whether the calibration is enough for what is made of it: tokens a column, windows that can be kept back.

A plan asks where headers and options tell, the step where only its windows do: all of a text, or padding among them.
"""

from __future__ import annotations

from collections.abc import Collection

from compress.arch.kv import KV_HEADS
from compress.errors import UserError
from compress.limits import ENOUGH
from compress.steps.prune.options import DROP, PruneOptions
from compress.steps.types import Complain


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
