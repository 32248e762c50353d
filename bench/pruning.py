"""One-shot pruning without training, on WikiText-2 and on fiction: our criteria and the peers at the same shapes.

    .venv/bin/python bench/pruning.py [--methods wanda obs flap] [--limit 1]

Calibrated on wikitext2-valid.txt (64 x 512 tokens), judged by bench/judge.py on 64 windows of wikitext2-test.txt and of
a second text that nothing is calibrated on. Four shapes: 20 % and 35 % of the decoder's matrix parameters, from the FFN
alone or with one query head of every KV group. Rows on file are skipped, so it can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _peers import FFN_ONLY, PEERS, Task
from _results import WORK, Results, say
from _texts import quality_options, second_text, wikitext
from judge import evenly_spaced, judge, load

import compress
from compress.checkpoint.source import locate
from compress.data import DataSpec, windows
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan

# name: (criterion, refit)
OURS = {
    "wanda": ("wanda", True),
    "obs": ("obs", True),
    "magnitude": ("magnitude", True),
    "wanda-sp": ("wanda", False),  # Wanda-sp is our wanda without the refit
    "magnitude-no-refit": ("magnitude", False),
}
RATIOS = (0.20, 0.35)
HEADS = (None, 0.3334)


@dataclass(frozen=True)
class Setting:
    """What all rows of one run share."""

    model: str
    samples: int
    length: int
    windows: int
    seed: int
    threads: int

    def key(self, method: str, ratio: float | None, heads: float | None) -> dict[str, Any]:
        shared = {"model": self.model, "samples": self.samples, "length": self.length}
        return {"method": method, "ratio": ratio, "heads": heads, **shared, "windows": self.windows, "seed": self.seed}


class Bench:
    """The dense model, the two texts, and how a row is measured."""

    def __init__(self, setting: Setting, calibration: Path, test: Path) -> None:
        self.setting, self.calibration = setting, calibration
        self.folder = locate(setting.model).folder
        self.machine = Machine.detect(setting.threads)
        self.dense = load(self.folder)
        self.rows = evenly_spaced(self.folder, test.read_text(encoding="utf-8"), setting.windows)
        self.second_name, text = second_text()
        self.second_rows = evenly_spaced(self.folder, text, setting.windows)
        self.second_dense = judge(self.dense, self.second_rows)["ppl"]

    def reference(self) -> dict[str, Any]:
        """The dense row."""
        found = judge(self.dense, self.rows)
        return {"perplexity": found["ppl"], "parameters": found["params"], **self._second(self.second_dense)}

    def row(self, method: str, ratio: float, heads: float | None) -> dict[str, Any]:
        """Prune by `method` and judge the result."""
        plan, task_plan = self._plan(ratio, heads)
        started = time.time()
        if method in OURS:
            out = WORK / f"pruning-{method}"
            criterion, refit = OURS[method]
            self._prune(out, criterion, refit, ratio, heads)
            seconds, model = time.time() - started, load(out)
            shutil.rmtree(out)
        else:
            model = PEERS[method](task_plan)
            seconds = time.time() - started
        found = judge(model, self.rows, self.dense)
        second = judge(model, self.second_rows)["ppl"]
        return {
            "perplexity": found["ppl"],
            "ratio": found["ratio"],
            "kl": found["kl"],
            "top1": found["top1"],
            "parameters": found["params"],
            "removed": plan.removed,
            "keep": dict(plan.keep[0]),
            **self._second(second),
            "second_ratio": second / self.second_dense,
            "seconds": round(seconds, 1),
            "threads": self.setting.threads,
        }

    def _second(self, perplexity: float) -> dict[str, Any]:
        return {"second_text": self.second_name, "second_perplexity": perplexity}

    def _plan(self, ratio: float, heads: float | None) -> tuple[PrunePlan, Task]:
        recipe = Recipe.single("prune", self.setting.model, PruneOptions(ratio=ratio, heads=heads), data=self._data())
        made = make_plan(recipe, self.machine, check_machine=False)
        (step,) = made.steps
        assert isinstance(step, PrunePlan)
        tokens = windows(self._data(), "calibration", self.folder, self.setting.seed)
        return step, Task(self.folder, step, made.family, torch.from_numpy(tokens.ids))

    def _data(self) -> DataSpec:
        return DataSpec(source=str(self.calibration), samples=self.setting.samples, length=self.setting.length)

    def _prune(self, out: Path, criterion: str, refit: bool, ratio: float, heads: float | None) -> None:
        compress.prune(
            self.setting.model,
            out,
            ratio=ratio,
            heads=heads,
            criterion=criterion,
            refit=refit,
            data=self._data(),
            seed=self.setting.seed,
            machine=self.machine,
            overwrite=True,
        )


def wanted(methods: list[str]) -> Iterator[tuple[str, float, float | None]]:
    """All rows, those that have a number to meet first."""
    for method in methods:
        for heads in HEADS:
            for ratio in RATIOS:
                if heads is None or method not in FFN_ONLY:
                    yield method, ratio, heads


def show(key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    shape = f"{key['ratio']:.2f}" + (" with heads" if key["heads"] else "")
    say(
        f"{key['method']:24} {shape:16} WikiText {found['ratio']:9.3f} x  KL {found['kl']:.3f}  "
        f"top-1 {found['top1']:.3f}  {found['second_text']} {found['second_ratio']:9.3f} x  {found['seconds']:.0f} s"
    )


def main() -> None:
    given = _arguments()
    text = wikitext(given.data)
    if text is None:
        return
    torch.set_num_threads(given.threads)
    setting = Setting(given.model, given.samples, given.length, given.windows, given.seed, given.threads)
    results = Results("pruning", given.results)
    bench: Bench | None = None
    reference = setting.key("dense", None, None)
    measured = 0
    for method, ratio, heads in wanted(given.methods):
        key = setting.key(method, ratio, heads)
        found = None if given.again else results.find(key)
        if found is None and measured < given.limit:
            bench = bench or Bench(setting, text.valid, text.test)
            if results.find(reference) is None:
                results.add(reference, bench.reference())
            found = bench.row(method, ratio, heads)
            results.add(key, found)
            measured += 1
            gc.collect()
        if found is not None:
            show(key, found)


def _arguments() -> argparse.Namespace:
    parser = quality_options(__doc__)
    names = [*OURS, *PEERS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="M", help=", ".join(names))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
