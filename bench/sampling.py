"""How long a model takes to write its own calibration text (`self`), and to read it again from the cache.

    .venv/bin/python bench/sampling.py [--samples 128] [--length 512]

Each a process of its own, imports and loading included: the first with an empty cache, the second with what it left.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

from _process import PYTHON, measured
from _results import Results, options, say

from compress.checkpoint.source import locate
from compress.machine import cores

CHILD = """\
import json, sys, torch
from pathlib import Path
from compress.data import DataSpec, windows
folder, samples, length, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
found = windows(DataSpec(source="self", samples=samples, length=length), "calibration", Path(folder), 0)
print(json.dumps({"digest": found.digest, "tokens": int(found.ids.size)}))
"""


def main() -> None:
    given = _arguments()
    results = Results("sampling", given.results)
    key = {"model": given.model, "samples": given.samples, "length": given.length, "threads": given.threads}
    found = None if given.again else results.find(key)
    if found is None:
        found = measure(given)
        results.add(key, found)
    say(
        f"{found['tokens']} tokens: {found['seconds']:.0f} s, peak {found['peak'] / 2**20:.0f} MiB; "
        f"from the cache {found['again_seconds']:.1f} s"
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both processes, the peak of the first, bytes."""
    size = [str(number) for number in (given.samples, given.length, given.threads)]
    line = [PYTHON, "-c", CHILD, str(locate(given.model).folder), *size]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AUTOGLM_COMPRESS_CACHE"] = cache  # for the children; the model has its folder already
        first, again = (measured(line, threads=given.threads) for _ in range(2))
    if first.document() != again.document():
        raise RuntimeError(f"the cache gave {again.document()}, drawn was {first.document()}")
    return {
        "tokens": first.document()["tokens"],
        "seconds": round(first.seconds, 1),
        "peak": first.peak,
        "again_seconds": round(again.seconds, 1),
    }


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=cores())
    return parser.parse_args()


if __name__ == "__main__":
    main()
