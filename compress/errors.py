"""The errors a user may see, the exit code each one ends with, and the words that messages share.

A `UserError` is one clear line and, where it helps, a hint; it never prints a traceback. Everything else that
escapes a command is our bug and ends with code 1.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

OK = 0
BUG = 1
USAGE = 2
GATE = 3
MACHINE = 4
INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells count
TERMINATED = 143  # 128 + SIGTERM


class CompressError(Exception):
    """One line for people, an optional hint, and the exit code the process ends with.

    `document`: what was found all the same, for the one JSON document that --json prints.
    """

    exit_code = BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.document: Mapping[str, Any] = {}


class UserError(CompressError):
    """The input is wrong: an option, a recipe, a folder, a missing extra, a name that is not found."""

    exit_code = USAGE


class GateError(CompressError):
    """A quality gate or a verification failed; `result` is what a run measured all the same, where there is one."""

    exit_code = GATE

    def __init__(self, message: str, hint: str | None = None, result: object = None) -> None:
        super().__init__(message, hint)
        self.result = result


class MachineError(CompressError):
    """The machine cannot do it: memory, disk, device, network."""

    exit_code = MACHINE


class Interrupted(CompressError):
    """Ctrl-C or SIGTERM, when a later run can go on: the message says what is kept."""

    exit_code = INTERRUPTED


class SelfCheckError(CompressError):
    """What we wrote is not what we meant to write. Ours to fix, and said so."""

    exit_code = BUG


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed name closest to `word`, if one is close enough to have been meant."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a name is near, else the list of what is allowed."""
    names = list(allowed)
    near = nearest(word, names)
    return f"; did you mean '{near}'?" if near else f"; allowed: {', '.join(names)}"


def interrupted(error: BaseException) -> bool:
    """Whether `error` is Ctrl-C, or what a library made of it: a fallback import turns it into an ImportError."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if isinstance(one, KeyboardInterrupt):
            return True
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            left += [one.__cause__, one.__context__]
    return False


def leave(word: str, code: int) -> NoReturn:
    """End the process here and now, with its one line: where an exception might be taken for another."""
    os.write(2, f"error: {word}\n".encode())
    os._exit(code)


def size(nbytes: float) -> str:
    """`268 B`, `12.9 KiB`, `256.6 MiB`, `19.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB" if nbytes < 1024 else f"{nbytes / 1024:.1f} TiB"
