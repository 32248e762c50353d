"""A cut of GLM-4.1V at full width: prune heads and FFN with INT8 in one pass, and quantize alone; peak and time.

    .venv/bin/python bench/foundation.py [--layers 4] [--prune keep_heads=28 keep_ffn=11264]

The checkpoint is written by bench/make_checkpoint.py and removed again (5.9 GB for 4 layers; the outputs take as
much); --model names one that exists and stays. `fused`: 8 x 512 tokens; the time of every layer stands beside what its
products and bytes take at the rates that this machine reaches in the same run. `quantize`: three times, between plainly
reading the source and writing as many bytes as the target has, synced, all from a cold page cache; the medians count,
because a virtual disk's speed changes from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from _arithmetic import moved, operations, seconds
from _plain_io import copied, forget
from _process import PROGRAM, PYTHON, Ran, checkpoint, command, measured, planned, recipe, weights
from _results import ROOT, WORK, Results, options, say

KIND = "glm-4.1v-9b"
LAYERS_TASK = "pruning layers"  # the task of the prune step whose every advance is a layer
ROUNDS = 3  # of quantize


def main() -> None:
    given = _arguments()
    results = Results("foundation", given.results)
    works: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {"fused": fused, "quantize": quantize}
    shared = {"model": KIND, "layers": given.layers, "format": given.format}
    keys: dict[str, dict[str, Any]] = {
        "fused": {
            "what": "fused",
            **shared,
            "prune": dict(given.prune),
            "samples": given.samples,
            "length": given.length,
        },
        "quantize": {"what": "quantize", **shared},
    }
    failed = False
    missing = [what for what in given.what if given.again or results.find(keys[what]) is None]
    if missing:
        with _model(given) as model:
            for what in missing:
                try:
                    results.add(keys[what], works[what](model, given))
                except subprocess.CalledProcessError as error:  # it has told why; the other does not depend on it
                    say(f"{what}: not measured, exit code {error.returncode}")
                    failed = True
    for what in given.what:
        if found := results.find(keys[what]):
            say(f"{what}: peak {found['peak'] / 2**30:.2f} GiB, {found['seconds']:.0f} s {json.dumps(found['beside'])}")
    if failed:
        raise SystemExit(1)


def fused(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Prune and quantize in one pass; the process is bench/_timed.py, which does what `run` does."""
    file = recipe(
        "foundation-fused",
        {
            "model": str(model),
            "data": {"calibration": {"source": "builtin", "samples": given.samples, "length": given.length}},
            "steps": [{"prune": dict(given.prune)}, {"quantize": {"format": given.format}}],
            "evaluate": "never",
            "keep_intermediate": False,
        },
    )
    plan, out = planned(file), WORK / "foundation-fused"
    rates = _rates(given)
    script = str(ROOT / "bench" / "_timed.py")
    line = [PYTHON, script, str(file), str(out), "--threads", str(given.threads)]
    ran = measured(line, threads=given.threads)
    (layers,) = (task["seconds"] for task in json.loads(ran.output.splitlines()[-1]) if task["task"] == LAYERS_TASK)
    if len(layers) != given.layers:
        raise RuntimeError(f"{len(layers)} of {given.layers} layers were timed")
    inspected = json.loads(subprocess.check_output([*PROGRAM, "inspect", str(model), "--json"], cwd=ROOT))
    parts = operations(inspected, plan["steps"][0], given.samples * given.length)
    bytes_ = moved(inspected, plan["steps"][-1])
    return {
        **_row(_steps(out), [ran], given),
        "rates": rates,
        "operations": [{"part": part, "bound": bound, "operations": count} for part, bound, count in parts],
        "bytes": bytes_,
        "layer_seconds": layers,
        "beside": {part: float(f"{value:.4g}") for part, value in seconds(parts, bytes_, rates).items()},
    }


def quantize(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Quantize several times, each between two rounds of plain reading and writing."""
    document = {"model": str(model), "steps": [{"quantize": {"format": given.format}}], "evaluate": "never"}
    file, out = recipe("foundation-quantize", document), WORK / "foundation-quantize"
    plan = planned(file)
    sources, size = sorted(model.glob("*.safetensors")), plan["steps"][-1]["bytes"]
    plain, ran, steps = [_plain(sources, size)], [], []
    shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
    for _ in range(ROUNDS):
        forget(sources)
        ran.append(measured(command(file, out, given.threads), threads=given.threads))
        if weights(out) != size:
            raise RuntimeError(f"the plan said {size} bytes, {out} holds {weights(out)}")
        steps = _steps(out)
        plain.append(_plain(sources, size))
    rounds = [round(one.seconds, 2) for one in ran]
    return _row(steps, ran, given) | {"rounds": rounds, "beside": {"plain": plain}, "written": size}


def _plain(sources: list[Path], size: int) -> float:
    """Seconds of reading `sources` and writing `size` bytes, from a cold page cache."""
    target = WORK / "foundation-plain.bin"
    forget(sources)
    try:
        return round(sum(copied(sources, target, size)), 2)
    finally:
        target.unlink(missing_ok=True)


def _steps(out: Path) -> list[dict[str, Any]]:
    """What a run measured of its steps; its output is removed."""
    steps: list[dict[str, Any]] = json.loads((out / "measured.json").read_text())["steps"]
    shutil.rmtree(out)
    return steps


def _row(steps: Sequence[dict[str, Any]], ran: Sequence[Ran], given: argparse.Namespace) -> dict[str, Any]:
    """What every row has: the highest peak, the median wall time, the steps of the last run."""
    told = ("seconds", "check_seconds", "stock_load")
    return {
        "peak": max(one.peak for one in ran),
        "seconds": round(statistics.median(one.seconds for one in ran), 2),
        "steps": {step["step"]: {key: step[key] for key in told} for step in steps},
        "predicted": max(step["memory_predicted"] for step in steps),
        "threads": given.threads,
    }


def _rates(given: argparse.Namespace) -> dict[str, Any]:
    WORK.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "bench" / "_rates.py")
    return measured([PYTHON, script, str(WORK), "--threads", str(given.threads)], threads=given.threads).document()


@contextmanager
def _model(given: argparse.Namespace) -> Iterator[Path]:
    """The checkpoint; removed afterwards if it was made here."""
    if given.model is not None:
        yield given.model.absolute()
        return
    folder = WORK / f"{KIND}-{given.layers}-layers"
    try:
        yield checkpoint(KIND, folder, given.layers)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    cut = [("keep_heads", 28), ("keep_ffn", 11264)]
    parser.add_argument("--what", nargs="+", choices=("fused", "quantize"), default=["fused", "quantize"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prune", nargs="+", type=_option, default=cut, metavar="KEY=VALUE", help="keys of the step")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", type=Path, help="a checkpoint of that depth that exists; it stays")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint that was made here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
