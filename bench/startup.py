"""How long a user waits before anything happens: `--help`, and `plan` of a 10 B model from its headers.

    .venv/bin/python bench/startup.py

Wall time of whole processes, median of 7 after one that warms the file cache, beside bare Python and a Python that
imports torch. The 10 B model has GLM-4.1V-9B's config and headers and no weights: its files are holes.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from _results import ROOT, WORK, Results, options, say

PYTHON = sys.executable
PROGRAM = (PYTHON, "-m", "compress")
RECIPE = ROOT / "recipes" / "autoglm-phone-9b-ffn.yaml"
MODEL = WORK / "glm41v-9b"

COMMANDS: dict[str, Sequence[str]] = {
    "python": (PYTHON, "-c", "pass"),
    "torch": (PYTHON, "-c", "import torch"),
    "help": (*PROGRAM, "--help"),
    "prune-help": (*PROGRAM, "prune", "--help"),
    "plan": (*PROGRAM, "plan", str(RECIPE), "--no-machine", "--set", f"model={MODEL}"),
}


def main() -> None:
    given = _arguments()
    results = Results("startup", given.results)
    for name in given.commands:
        key = {"command": name, "runs": given.runs}
        found = None if given.again else results.find(key)
        if found is None:
            if name == "plan":
                _sparse_model()
            found = measure(COMMANDS[name], given.runs)
            results.add(key, found)
        say(
            f"{name:12} {found['median']:.3f} s  ({found['min']:.3f} to {found['max']:.3f}, {given.runs} runs; "
            f"processor {found['cpu']:.3f} s)"
        )


def measure(command: Sequence[str], runs: int) -> dict[str, float]:
    """Seconds of `command`: median, least and most of `runs`, after one that does not count."""
    _once(command)
    timed = [_once(command) for _ in range(runs)]
    wall, cpu = [wall for wall, _ in timed], [cpu for _, cpu in timed]
    return {"median": statistics.median(wall), "min": min(wall), "max": max(wall), "cpu": statistics.median(cpu)}


def _once(command: Sequence[str]) -> tuple[float, float]:
    """Wall and processor seconds of one process; the latter show what a busy machine adds to the former."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _sparse_model() -> None:
    shutil.rmtree(MODEL, ignore_errors=True)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [PYTHON, "-m", "tests.sparse", "glm41v_9b", str(MODEL)],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), metavar="C")
    return parser.parse_args()


if __name__ == "__main__":
    main()
