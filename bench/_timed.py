"""Carry out a recipe as `autoglm-compress run` does, and time what its progress tells: every layer of every pass.

    .venv/bin/python bench/_timed.py RECIPE OUT --threads N [--memory BYTES]

One JSON line: a list of {task, total, seconds: [between two steps of its bar, ...]}.
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


class Clock:
    """A Progress that shows nothing and notes when each unit of work was done."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Clock]:
        self.tasks.append({"task": label, "total": total, "seconds": []})
        self._last = time.perf_counter()
        yield self

    def advance(self, by: int = 1) -> None:
        if by:  # 0: nothing of an interrupted run was taken over
            now = time.perf_counter()
            self.tasks[-1]["seconds"].append(round(now - self._last, 4))
            self._last = now

    def note(self, line: str) -> None:
        del line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory", type=int)
    given = parser.parse_args()
    clock = Clock()
    machine = Machine.detect(given.threads, given.memory)
    compress.run(given.recipe, given.out, machine=machine, overwrite=True, progress=clock)
    print(json.dumps(clock.tasks))


if __name__ == "__main__":
    main()
