"""Carry out a recipe as `autoglm-compress run` does, and time what its progress tells: every layer of every pass.

    .venv/bin/python bench/_timed.py RECIPE OUT --threads N

One JSON line: a list of {task, total, seconds: [between two steps of its bar, ...]}. The first seconds of a task count
from its beginning.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compress
from compress.machine import Machine


class Steps:
    """The seconds of one task."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def advance(self, by: int = 1, earlier: bool = False) -> None:
        if not earlier:
            now = time.perf_counter()
            self.seconds.append(round(now - self._last, 4))
            self._last = now


class Clock:
    """A Progress that shows nothing and notes when each unit of work was done."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Steps]:
        steps = Steps()
        self.tasks.append({"task": label, "total": total, "seconds": steps.seconds})
        yield steps

    def note(self, line: str) -> None:
        del line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    clock = Clock()
    machine = Machine.detect(given.threads)
    compress.run(given.recipe, given.out, machine=machine, overwrite=True, fresh=True, progress=clock)
    print(json.dumps(clock.tasks))


if __name__ == "__main__":
    main()
