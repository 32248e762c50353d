"""Reading files and writing a file with nothing done to the bytes: what any conversion takes at least."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

CHUNK = 64 * 2**20


def copied(sources: Sequence[Path], target: Path, nbytes: int) -> tuple[float, float]:
    """Read all of `sources` and write `nbytes` of what was read to `target`, synced; seconds of reading, of writing.

    What was read last is written again where the sources hold less than `nbytes`.
    """
    buffer = bytearray(CHUNK)
    reading = writing = 0.0
    left, filled = nbytes, 0
    with target.open("wb", buffering=0) as out:
        for source in sources:
            with source.open("rb", buffering=0) as file:
                while True:
                    start = time.perf_counter()
                    count = file.readinto(buffer)
                    reading += time.perf_counter() - start
                    if not count:
                        break
                    filled = count
                    start = time.perf_counter()
                    left -= out.write(memoryview(buffer)[: min(count, left)])
                    writing += time.perf_counter() - start
        start = time.perf_counter()
        while left > 0:
            left -= out.write(memoryview(buffer)[: min(filled, left)])
        os.fsync(out.fileno())
        writing += time.perf_counter() - start
    return reading, writing


def forget(files: Sequence[Path]) -> None:
    """Drop the files from the page cache, so that the next reader goes to the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
