"""What this machine does at most, in the library that we use: matrix products, a factorisation, the disk.

    .venv/bin/python bench/_rates.py FOLDER --threads N [--size 4096] [--disk GIB]

One JSON line. GFLOP/s in bfloat16, float32 and float64 and of a float32 Cholesky factorisation; GB/s read from FOLDER's
disk and written to it with fsync. The best of three, after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _plain_io import CHUNK, copied, forget

REPEATS = 3


def product(dtype: torch.dtype, size: int) -> float:
    """GFLOP/s of a square matrix product."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: left @ right) / 1e9


def factorisation(size: int) -> float:
    """GFLOP/s of a Cholesky factorisation in float32, n^3 / 3 operations."""
    matrix = torch.randn(size, size)
    matrix = matrix @ matrix.T
    matrix.diagonal().add_(size)
    return size**3 / 3 / best(lambda: torch.linalg.cholesky_ex(matrix)) / 1e9


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def disk(folder: Path, nbytes: int) -> tuple[float, float]:
    """GB/s read and written."""
    file, copy = folder / "rates.bin", folder / "rates.copy"
    try:
        block = os.urandom(CHUNK)
        with file.open("wb") as out:
            for _ in range(max(1, nbytes // CHUNK)):
                out.write(block)
        forget([file])
        size = file.stat().st_size
        read, written = copied([file], copy, size)
        return size / read / 1e9, size / written / 1e9
    finally:
        file.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--disk", type=float, default=2.0, metavar="GIB")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    read, written = disk(given.folder, int(given.disk * 2**30))
    rates = {
        "bf16": product(torch.bfloat16, given.size),
        "f32": product(torch.float32, given.size),
        "f64": product(torch.float64, given.size // 2),
        "cholesky": factorisation(2 * given.size),
        "read": read,
        "write": written,
    }
    print(json.dumps({name: round(value, 3) for name, value in rates.items()}))


if __name__ == "__main__":
    main()
