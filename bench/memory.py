"""Peak memory of `prune` and `quantize` above interpreter and libraries, each measured as a whole process.

    .venv/bin/python bench/memory.py

SmolLM2 (64 x 512 tokens, 20 %), and a built llama of 8 and of 64 layers (8 x 512): memory must not grow with depth.
Above what: the resident memory of a Python right after it has imported torch, transformers and this package.
The self-check is part of the process: it loads as many layers in stock transformers as fit in the plan's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _process import PYTHON, checkpoint, command, measured, recipe, weights
from _results import ROOT, WORK, Results, options, say

IMPORTS = "import torch, transformers, compress, compress.cli, compress.run"
PRINT_RESIDENT = "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmRSS:')))"


@dataclass(frozen=True)
class Case:
    """One command on one model; `layers` None: the demo model."""

    name: str
    layers: int | None
    step: str
    samples: int

    def recipe(self, model: str, length: int) -> Path:
        """The case as a recipe file."""
        options = {"prune": {"ratio": 0.2}, "quantize": {"format": "int8"}}
        data = {"calibration": {"source": "builtin", "samples": self.samples, "length": length}}
        steps = [{self.step: options[self.step]}]
        return recipe(f"memory-{self.step}", {"model": model, "data": data, "steps": steps, "evaluate": "never"})


def main() -> None:
    given = _arguments()
    results = Results("memory", given.results)
    failed = False
    for case in _cases(given):
        key = {
            "model": case.name,
            "layers": case.layers,
            "step": case.step,
            "samples": case.samples if case.step == "prune" else None,
            "length": given.length if case.step == "prune" else None,
        }
        found = None if given.again else results.find(key)
        if found is None:
            try:
                found = measure(case, given)
            except subprocess.CalledProcessError as error:  # it has told why; the other rows do not depend on it
                say(f"{case.name:10} {case.step:9} not measured: exit code {error.returncode}")
                failed = True
                continue
            results.add(key, found)
        what = f"{case.name:10} {case.step:9}"
        say(f"{what} {_mib(found['above'])} above the imports' {_mib(found['imports'])}")
        say(
            f"    in the step {_mib(found['step_above'])}, predicted {_mib(found['predicted'])}; "
            f"stock load: {found['stock_load']}; {found['seconds']:.0f} s"
        )
    if failed:
        raise SystemExit(1)


def measure(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """Run one case; all sizes in bytes."""
    model = given.model if case.layers is None else str(_built(case.layers))
    out = WORK / f"memory-{case.step}"
    imports = resident_after_imports()
    threads = given.threads or len(os.sched_getaffinity(0))
    file = case.recipe(model, given.length)
    ran = measured(command(file, out, threads))
    (step,) = json.loads((out / "measured.json").read_text())["steps"]
    written = weights(out)
    shutil.rmtree(out)
    return {
        "peak": ran.peak,
        "imports": imports,
        "above": ran.peak - imports,
        "step_above": step["memory_peak"] - step["memory_before"],
        "predicted": step["memory_predicted"],
        "stock_load": step["stock_load"],
        "weights_written": written,
        "seconds": round(ran.seconds, 1),
        "threads": threads,
    }


def resident_after_imports() -> int:
    """Bytes resident in a process that has only done the imports."""
    done = subprocess.run([PYTHON, "-c", f"{IMPORTS}; {PRINT_RESIDENT}"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{IMPORTS}: exit code {done.returncode}\n{done.stderr}")
    return int(done.stdout) * 1024


def _built(layers: int) -> Path:
    return checkpoint("llama-1k", WORK / f"llama-1k-{layers}-layers", layers)


def _cases(given: argparse.Namespace) -> list[Case]:
    models = [("demo", None, given.samples), *((f"llama-{n}", n, given.built_samples) for n in given.layers)]
    return [Case(name, layers, step, samples) for step in given.steps for name, layers, samples in models]


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m", help="the model of the rows named demo")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of the demo model")
    parser.add_argument("--built-samples", type=int, default=8, help="calibration windows of the built models")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 64], help="depths of the built models")
    parser.add_argument("--steps", nargs="+", choices=("prune", "quantize"), default=["prune", "quantize"])
    parser.add_argument("--threads", type=int, help="default: all cores")
    return parser.parse_args()


if __name__ == "__main__":
    main()
