"""What pruning takes against the bare forward pass of its calibration tokens, and where the time goes.

    .venv/bin/python bench/pruning_speed.py [--rounds 3]

The forward pass is the stock model's in float32, decoder and output matrix, batches of 4 windows, nothing else counted.
Pruning is the whole command: imports, digests, statistics, ranking, refit, writing, self-check. They take turns, with
the same threads; medians. Then `sensitivity`, and three budgets planned from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from _process import PROGRAM, PYTHON, measured, recipe
from _results import WORK, Results, options, say
from _texts import DATA, wikitext

from compress.machine import cores

FORWARD = """\
import json, sys, time, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from compress.checkpoint.source import locate
from compress.data import DataSpec, windows
model, text, samples, length, threads = *sys.argv[1:3], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
folder = locate(model).folder
ids = torch.from_numpy(windows(DataSpec(source=text, samples=samples, length=length), "calibration", folder, 0).ids)
stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    stock(ids[:1])
    start = time.perf_counter()
    for batch in ids.split(4):
        stock(batch)
print(json.dumps(time.perf_counter() - start))
"""
BUDGETS = (0.20, 0.35, 0.50)


def main() -> None:
    given = _arguments()
    text = wikitext(given.data)
    if text is None:
        return
    results = Results("pruning_speed", given.results)
    key = {name: getattr(given, name) for name in ("model", "samples", "length", "threads", "rounds")}
    found = None if given.again else results.find(key)
    if found is None:
        found = measure(given, text.valid)
        results.add(key, found)
    say(json.dumps(found))


def measure(given: argparse.Namespace, text: Path) -> dict[str, Any]:
    """Medians over the rounds, in seconds; `tasks`: the passes of the last pruning, as its progress bars name them."""
    size = [str(number) for number in (given.samples, given.length, given.threads)]
    calibration = {"source": str(text), "samples": given.samples, "length": given.length}
    document = {"model": given.model, "data": {"calibration": calibration}, "steps": [{"prune": {"ratio": 0.2}}]}
    file = recipe("pruning-speed", document | {"evaluate": "never"})
    seconds: dict[str, list[float]] = {"forward": [], "prune": []}
    tasks: list[dict[str, Any]] = []
    timed = [PYTHON, str(Path(__file__).with_name("_timed.py")), str(file), str(WORK / "pruning-speed")]
    for _ in range(given.rounds):
        forward = measured([PYTHON, "-c", FORWARD, given.model, str(text), *size], threads=given.threads)
        seconds["forward"].append(json.loads(forward.output.splitlines()[-1]))
        pruned = measured([*timed, "--threads", str(given.threads)], threads=given.threads)
        seconds["prune"].append(pruned.seconds)
        tasks = json.loads(pruned.output.splitlines()[-1])
    found: dict[str, Any] = {name: round(statistics.median(each), 1) for name, each in seconds.items()}
    found["tasks"] = {task["task"]: round(sum(task["seconds"]), 1) for task in tasks}
    return found | _sensitivity(given, text)


def _sensitivity(given: argparse.Namespace, text: Path) -> dict[str, Any]:
    """Seconds of the analysis, and of each plan made from it."""
    out, shared = WORK / "pruning-sensitivity", ["--threads", str(given.threads)]
    data = ["--data", str(text), "--samples", str(given.samples), "--length", str(given.length)]
    line = [*PROGRAM, "sensitivity", given.model, "-o", str(out), "--overwrite", "-q", *data, *shared]
    analysis = measured(line, threads=given.threads)
    plans = []
    for budget in BUDGETS:
        steps = [{"prune": {"ratio": budget, "from_sensitivity": str(out), "allocation": "per-layer"}}]
        file = recipe(f"pruning-budget-{budget}", {"model": given.model, "steps": steps, "evaluate": "never"})
        plans.append(measured([*PROGRAM, "plan", str(file), "--json"], threads=given.threads).seconds)
    return {"sensitivity": round(analysis.seconds, 1), "plans": [round(value, 2) for value in plans]}


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="where the WikiText-2 files are")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores())
    return parser.parse_args()


if __name__ == "__main__":
    main()
