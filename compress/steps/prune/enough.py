"""Whether the calibration is enough for what is made of it: tokens a column, windows that can be kept back.

A plan asks where headers and options tell, the step where only its windows do: all of a text, or padding among them.
"""

from __future__ import annotations

from compress.errors import UserError
from compress.steps.prune.options import PruneOptions


def few_tokens(tokens: int, columns: int, besides: str = "") -> UserError | None:
    """What is wrong with fewer tokens than a Gram matrix has columns; None where there are as many. `besides`: which
    tokens do not count."""
    if tokens >= columns:
        return None
    return UserError(
        f"{tokens} calibration tokens{besides} for a Gram matrix of {columns} columns: {tokens / columns:.2f} a "
        "column, and under 1 it is singular",
        hint="give more samples (4 tokens a column or more), or force: true (--force)",
    )


def windows_back(options: PruneOptions, windows: int) -> int:
    """How many of the windows are kept back to choose damping on, the last ones; UserError for none, or all of them."""
    if options.held_out is None or not options.refit:
        return 0
    back = round(options.held_out * windows)
    if not 0 < back < windows:
        raise UserError(f"{options.held_out} of {windows} calibration windows is none, or all of them")
    return back
