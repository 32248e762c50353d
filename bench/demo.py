"""The demo from end to end: what `make demo` runs, every stage against dense, and the time it takes.

    .venv/bin/python bench/demo.py

Starts `run recipes/demo.yaml` as a process of its own and reads the numbers from the receipt.json and measured.json
that it leaves. A failed gate (exit code 3) is a result as well: it is read from OUT.rejected.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _results import ROOT, WORK, Results, options, say

GATE = 3  # exit code of a run whose gate failed
METRICS = ("perplexity", "perplexity_ratio", "kl", "top1_agreement", "parameters", "bytes")


def main() -> None:
    given = _arguments()
    results = Results("demo", given.results)
    key = {"recipe": str(given.recipe), "set": given.set}
    found = None if given.again else results.find(key)
    if found is None:
        found = run(given)
        results.add(key, found)
    for row in found["stages"]:
        say("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items()))
    say(f"exit code {found['exit_code']}, {found['seconds']:.0f} s")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Carry out the recipe; one row a stage, seconds of the whole process, and the gates that failed."""
    command = [sys.executable, "-m", "compress", "run", str(given.recipe), "--overwrite", "--output", str(given.output)]
    for override in given.set:
        command += ["--set", override]
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT).returncode
    seconds = time.perf_counter() - start
    if code not in (0, GATE):
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    folder = given.output if code == 0 else given.output.with_name(given.output.name + ".rejected")
    receipt = json.loads((folder / "receipt.json").read_text())
    measured = json.loads((folder / "measured.json").read_text())
    return {
        "exit_code": code,
        "seconds": round(seconds, 1),
        "stages": stages(receipt, measured),
        "gates": receipt["recipe"].get("gates"),
        "failed": (receipt.get("gates") or {}).get("failed", []),
        "threads": receipt["threads"],
    }


def stages(receipt: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluated stages in order, with the seconds of the step and of its evaluation, and the step's memory."""
    steps = {step["step"]: step for step in measured["steps"]}
    rows = []
    for stage in receipt["stages"]:
        row = {"stage": stage["stage"], **{name: stage[name] for name in METRICS if name in stage}}
        row["evaluation_seconds"] = measured.get("evaluation_seconds", {}).get(stage["stage"])
        if step := steps.get(stage["stage"]):
            row |= {"seconds": step["seconds"], "memory": step["memory_peak"] - step["memory_before"]}
            row["memory_predicted"] = step["memory_predicted"]
        rows.append(row)
    return rows


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--output", type=Path, default=WORK / "demo", help="folder to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `run --set`")
    given = parser.parse_args()
    given.output = given.output.absolute()
    return given


if __name__ == "__main__":
    main()
