"""One-shot pruning without training, judged on WikiText-2 and on texts of other kinds: our criteria, and peers at the
same shapes.

    .venv/bin/python bench/pruning.py [--methods wanda obs flap] [--calibrations wikitext self+wikitext] [--limit 1]
    .venv/bin/python bench/pruning.py --ablation

At most 128 x 512 calibration tokens; judged by bench/judge.py on 64 windows of wikitext2-test.txt and of every text of
bench/_far_texts.py, which nothing is calibrated on. A row is a method, a calibration, a share of the decoder's matrix
parameters that goes, from the FFN alone or with one query head of every KV group, and a seed of the calibration. Rows
on file are skipped, so it can be stopped and resumed; a row that lacks one of the texts is measured again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _far_texts import FAR_TEXTS, far_texts
from _peers import FFN_ONLY, PEERS, Task
from _results import WORK, Results, say
from _texts import WikiText, quality_options, wikitext
from judge import evenly_spaced, judge, load

import compress
from compress.checkpoint.source import locate
from compress.criteria import CRITERIA
from compress.data import DataSpec, windows
from compress.machine import Machine, cpu_precision
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.steps.prune import run
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan

# every criterion with the refit, under its own name; without it, under the name of the method that it is then
OURS: dict[str, dict[str, Any]] = {name: {"criterion": name} for name in CRITERIA} | {
    "wanda-sp": {"criterion": "wanda", "refit": False},
    "minitron": {"criterion": "activation", "refit": False},
    "magnitude-no-refit": {"criterion": "magnitude", "refit": False},
    "wanda-held-out": {"criterion": "wanda", "held_out": 0.125},
    "wanda-joint": {"criterion": "wanda", "joint_refit": 2},
    "wanda-propagated": {"criterion": "wanda", "error_propagation": 0.3},
    "wanda-joint-propagated": {"criterion": "wanda", "joint_refit": 2, "error_propagation": 0.3},
}
# widths that differ by layer, from an analysis of the same calibration: the criterion of it, what else `prune` is told
PER_LAYER: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda-per-layer": ("wanda", {}),
    "wanda-joint-per-layer": ("wanda", {"joint_refit": 2}),
    "wanda-propagated-per-layer": ("wanda", {"error_propagation": 0.3}),
    "wanda-joint-propagated-per-layer": ("wanda", {"joint_refit": 2, "error_propagation": 0.3}),
    "obs-per-layer": ("obs", {}),
    "obs-joint-per-layer": ("obs", {"joint_refit": 2}),
    "obs-propagated-per-layer": ("obs", {"error_propagation": 0.3}),
    "obs-joint-propagated-per-layer": ("obs", {"joint_refit": 2, "error_propagation": 0.3}),
}
# the default with one thing changed
CHANGED: dict[str, dict[str, Any]] = {
    "wanda-norm": {"criterion": "wanda", "token_weights": "norm"},
    "wanda-damping-0.001": {"criterion": "wanda", "damping": 0.001},
    "wanda-damping-0.1": {"criterion": "wanda", "damping": 0.1},
    "wanda-dense-inputs": {"criterion": "wanda"},  # statistics of the dense model's layers: see `dense_inputs`
}
OWN = OURS | CHANGED
ABLATED = (
    "wanda",
    "wanda-joint",
    "wanda-sp",
    "random",
    "magnitude",
    "activation",
    "flap",
    "obs",
    "wanda-held-out",
    "wanda-per-layer",
)
SIZES = (64, 32, 16)  # calibration windows of the ablation, beside those of all other rows
CALIBRATIONS = ("wikitext", "self+wikitext", "self", "builtin", "self+builtin")
RATIOS = (0.20, 0.35, 0.50)
SHAPES = {"ffn": None, "heads": 0.3334}
BUILTIN_WINDOWS = 72  # all that the builtin text has
TEXTS = ("wikitext", *FAR_TEXTS)  # what every row is judged on, in this order


@dataclass(frozen=True)
class Case:
    """One row: what is pruned how. `shape`: what goes, the FFN alone or heads with it."""

    method: str
    calibration: str
    shape: str
    ratio: float
    seed: int


@dataclass(frozen=True)
class Setting:
    """What all rows of one run share."""

    model: str
    samples: int
    length: int
    windows: int

    def key(self, case: Case | None) -> dict[str, Any]:
        return {"dense": True, **asdict(self)} if case is None else asdict(case) | asdict(self)


class Bench:
    """The dense model, the texts, and how a row is measured."""

    def __init__(self, setting: Setting, text: WikiText, far: dict[str, str], threads: int) -> None:
        self.setting, self.text = setting, text
        self.folder = locate(setting.model).folder
        self.machine = Machine.detect(threads)
        self.analyses: set[Path] = set()  # made in this process
        read = {"wikitext": text.test.read_text(encoding="utf-8")} | far
        self.rows = {name: evenly_spaced(self.folder, told, setting.windows) for name, told in read.items()}
        # where bfloat16 is emulated, judging would take hours: both sides of every ratio are judged in float32 there
        self.dtype = "auto" if cpu_precision().native else "float32"
        dense = load(self.folder, self.dtype)
        self.dense = {name: judge(dense, rows) for name, rows in self.rows.items()}

    def reference(self) -> dict[str, Any]:
        """The dense row."""
        return {"perplexity": {name: found["ppl"] for name, found in self.dense.items()}}

    def row(self, case: Case) -> dict[str, Any]:
        """Prune and judge the result: times dense on each text, the first WikiText-2, with the standard error of each,
        relative: windows are pairs of dense and pruned."""
        started = time.time()
        predicted: dict[str, float] = {}
        if case.method in OWN or case.method in PER_LAYER:
            out = WORK / f"pruning-{case.method}"
            shared: dict[str, Any] = {
                "data": self._data(case),
                "seed": case.seed,
                "machine": self.machine,
                "overwrite": True,
            }
            how = dict(OWN.get(case.method) or self._measured(case, shared))
            how |= {"ratio": case.ratio, "heads": SHAPES[case.shape]} | shared
            with dense_inputs() if case.method == "wanda-dense-inputs" else nullcontext():
                receipt = compress.prune(self.setting.model, out, **how).receipt
            predicted = {key: value for key, value in receipt["steps"][0].items() if key == "predicted_loss"}
            seconds, model = time.time() - started, load(out, self.dtype)
            shutil.rmtree(out)
        else:
            model = PEERS[case.method](self._task(case))
            model = model if self.dtype == "auto" else model.float()
            seconds = time.time() - started
        found: dict[str, Any] = {"ratio": {}, "error": {}, "judged_in": self.dtype, **predicted}
        for name, rows in self.rows.items():
            after = torch.tensor(judge(model, rows)["window_nll"])
            rise = after - torch.tensor(self.dense[name]["window_nll"])
            found["ratio"][name] = math.exp(float(rise.mean()))
            found["error"][name] = float(rise.std() / len(rise) ** 0.5)
        parameters = sum(value.numel() for value in model.parameters())
        return found | {"parameters": parameters, "seconds": round(seconds, 1), "threads": self.machine.threads}

    def _data(self, case: Case) -> DataSpec:
        valid = str(self.text.valid)
        sources: dict[str, str | dict[str, float]] = {
            "wikitext": valid,
            "self+wikitext": {"self": 0.5, valid: 0.5},
            "self+builtin": {"self": 0.5, "builtin": 0.5},
        }
        samples = min(self.setting.samples, BUILTIN_WINDOWS) if case.calibration == "builtin" else self.setting.samples
        source = sources.get(case.calibration, case.calibration)
        return DataSpec(source=source, samples=samples, length=self.setting.length)

    def _measured(self, case: Case, shared: dict[str, Any]) -> dict[str, Any]:
        """The options that take the widths of the layers from an analysis, made once for all ratios."""
        criterion, besides = PER_LAYER[case.method]
        name = f"{criterion}-{case.calibration}-{self.setting.samples}-{case.seed}"
        folder = WORK / f"pruning-sensitivity-{name}"
        if folder not in self.analyses:
            compress.measure_sensitivity(self.setting.model, folder, criterion=criterion, pictures=False, **shared)
            self.analyses.add(folder)
        return {"from_sensitivity": str(folder), "allocation": "per-layer"} | besides

    def _task(self, case: Case) -> Task:
        options = PruneOptions(ratio=case.ratio, heads=SHAPES[case.shape])
        recipe = Recipe.single("prune", self.setting.model, options, data=self._data(case))
        made = make_plan(recipe, self.machine, check_machine=False)
        (step,) = made.steps
        assert isinstance(step, PrunePlan)
        tokens = windows(self._data(case), "calibration", self.folder, case.seed)
        return Task(self.folder, step, made.family, torch.from_numpy(tokens.ids))


@contextmanager
def dense_inputs() -> Iterator[None]:
    """Inside, every layer is measured behind the layers of the dense model, not behind those that are cut already. The
    product has no such option: its pass hands its hidden states through the dense layer instead of the cut one."""
    finish = run._Pruner._finish

    def through_dense(self: Any, index: int, tensors: Any, hidden: torch.Tensor | None, probe: torch.Tensor) -> None:
        finish(self, index, tensors, None, probe)
        if hidden is not None:
            with self.before.layer(index) as layer:
                self.before.advance(layer, hidden, positions=self.positions)

    run._Pruner._finish = through_dense  # type: ignore[method-assign]
    try:
        yield
    finally:
        run._Pruner._finish = finish  # type: ignore[method-assign]


def asked(given: argparse.Namespace) -> Iterator[tuple[Setting, Case]]:
    """All rows that were asked for, with their setting; the ablation: 20 % of the FFN, one thing changed a row."""
    setting = Setting(given.model, given.samples, given.length, given.windows)
    if not given.ablation:
        yield from ((setting, case) for case in wanted(given))
        return
    for method in (*ABLATED, *CHANGED):
        yield setting, Case(method, "wikitext", "ffn", RATIOS[0], given.seeds[0])
    for samples in SIZES:
        yield replace(setting, samples=samples), Case("wanda", "wikitext", "ffn", RATIOS[0], given.seeds[0])


def wanted(given: argparse.Namespace) -> Iterator[Case]:
    """All rows of the tables by calibration that were asked for, the first seed's first."""
    order = itertools.product(given.seeds, given.calibrations, given.methods, given.shapes, given.ratios)
    for seed, calibration, method, shape, ratio in order:
        if shape == "ffn" or method not in (*FFN_ONLY, *PER_LAYER):  # per-layer: heads against FFN is the allocation's
            yield Case(method, calibration, shape, ratio, seed)


def on_file(results: Results, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was found for this key, if it was judged on all texts: rows of some texts are never mixed with others."""
    found = results.find(key)
    return found if found and tuple(found.get("ratio") or found["perplexity"]) == TEXTS else None


def show(case: Case, found: Mapping[str, Any]) -> None:
    texts = "  ".join(f"{name} {ratio:8.3f} x" for name, ratio in found["ratio"].items())
    what = f"{case.method:20} {case.calibration:14} {case.shape:6} {case.ratio:.2f} seed {case.seed}"
    say(f"{what}  {texts}  {found['seconds']:.0f} s")


def main() -> None:
    given = arguments()
    text, far = wikitext(given.data), far_texts()
    if text is None or far is None:
        return
    torch.set_num_threads(given.threads)
    results = Results("pruning", given.results)
    bench: Bench | None = None
    measured = 0
    for setting, case in asked(given):
        key = setting.key(case)
        found = None if given.again else on_file(results, key)
        if found is None and measured < given.limit:
            bench = bench or Bench(setting, text, far, given.threads)
            bench.setting = setting
            if on_file(results, setting.key(None)) is None:
                results.add(setting.key(None), bench.reference())
            found = bench.row(case)
            results.add(key, found)
            measured += 1
            gc.collect()
        if found is not None:
            show(case, found)


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    """The command line, or what a test gives in its place."""
    parser = quality_options(__doc__)
    names = [*OURS, *PER_LAYER, *PEERS]
    known = [*names, *CHANGED]
    parser.add_argument("--methods", nargs="+", choices=known, default=names, metavar="M", help=", ".join(known))
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=["wikitext"], metavar="C")
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, default=RATIOS[:2], metavar="R")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="S")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="S", help="of the calibration")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--ablation", action="store_true", help="the rows of the ablation instead")
    return parser.parse_args(line)


if __name__ == "__main__":
    main()
