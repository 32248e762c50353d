"""Damping of the refit and of obs: three ways to scale the ridge, three strengths, two calibration sizes.

    .venv/bin/python bench/damping.py [--limit 1]

FFN only, 20 %. The ridge of column j is lambda times the mean of H's diagonal (ours), lambda * H_jj, or lambda times
the median of the diagonal. A setting chosen here is chosen on these numbers, so nothing of the test split is used:
calibrated on the first three quarters of wikitext2-valid.txt, judged on 64 windows of its last quarter.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _results import WORK, Results, say
from _texts import quality_options, wikitext
from judge import evenly_spaced, judge, load

import compress
from compress.checkpoint.source import locate
from compress.criteria import obs
from compress.machine import Machine
from compress.steps.prune import run as prune_step

RATIO = 0.20
CALIBRATED_ON = 0.75  # share of the validation text; the rest is judged on
FLOOR = 1e-3  # of the mean-based ridge: a column that no token excites would stay singular under lambda * H_jj

Ridge = Callable[[torch.Tensor, float], torch.Tensor]


def mean_ridge(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """lambda times the mean of the diagonal, for every column."""
    return torch.full_like(hessian.diagonal(), damping * float(hessian.diagonal().mean()))


def column_ridge(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """lambda times the column's own diagonal."""
    diagonal = hessian.diagonal()
    return (damping * diagonal).clamp(min=FLOOR * damping * float(diagonal.mean()))


def median_ridge(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """lambda times the median of the diagonal, for every column."""
    return torch.full_like(hessian.diagonal(), damping * float(hessian.diagonal().median()))


RIDGES: dict[str, Ridge] = {"mean": mean_ridge, "column": column_ridge, "median": median_ridge}
LAMBDAS = (0.003, 0.01, 0.03)
CRITERIA = ("wanda", "obs")
SAMPLES = (8, 64)


@contextmanager
def ridge_replaced(ridge: Ridge) -> Iterator[None]:
    """While open, the prune step and obs take their ridge from `ridge`; fails if none was asked for."""
    calls = 0

    def counted(hessian: torch.Tensor, damping: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ridge(hessian, damping)

    places: tuple[Any, ...] = (prune_step, obs)
    originals = [place.damping_vector for place in places]
    for place in places:
        place.damping_vector = counted
    try:
        yield
    finally:
        for place, original in zip(places, originals, strict=True):
            place.damping_vector = original
    if not calls:
        raise RuntimeError("the prune step did not ask for its ridge here: this script measures nothing")


def split(valid: Path) -> tuple[Path, str]:
    """A file with the first part of the validation text, and the rest, cut at an article's heading."""
    text = valid.read_text(encoding="utf-8")
    middle = int(len(text) * CALIBRATED_ON)
    heading = text.find("\n = ", middle)
    middle = heading if heading > 0 else middle
    head = WORK / "damping-calibration.txt"
    head.parent.mkdir(parents=True, exist_ok=True)
    head.write_text(text[:middle], encoding="utf-8")
    return head, text[middle:]


class Bench:
    """Judged windows, the dense perplexity on them, and how a row is measured."""

    def __init__(self, given: argparse.Namespace, valid: Path) -> None:
        self.given = given
        self.calibration, judged = split(valid)
        folder = locate(given.model).folder
        self.rows = evenly_spaced(folder, judged, given.windows)
        self.dense = judge(load(folder), self.rows)["ppl"]

    def row(self, criterion: str, samples: int, ridge: str, damping: float) -> dict[str, Any]:
        """Prune with this ridge and judge the result."""
        out, started = WORK / "damping", time.time()
        with ridge_replaced(RIDGES[ridge]):
            compress.prune(
                self.given.model,
                out,
                ratio=RATIO,
                criterion=criterion,
                damping=damping,
                data={"source": str(self.calibration), "samples": samples, "length": self.given.length},
                seed=self.given.seed,
                machine=Machine.detect(self.given.threads),
                overwrite=True,
            )
        seconds = time.time() - started
        perplexity = judge(load(out), self.rows)["ppl"]
        shutil.rmtree(out)
        return {
            "perplexity": perplexity,
            "dense_perplexity": self.dense,
            "ratio": perplexity / self.dense,
            "seconds": round(seconds, 1),
            "threads": self.given.threads,
        }


def main() -> None:
    given = _arguments()
    text = wikitext(given.data)
    if text is None:
        return
    torch.set_num_threads(given.threads)
    results = Results("damping", given.results)
    shared = {k: getattr(given, k) for k in ("model", "length", "windows", "seed")}
    bench: Bench | None = None
    measured = 0
    grid = [(c, s, r, d) for s in given.samples for c in CRITERIA for r in RIDGES for d in LAMBDAS]
    for criterion, samples, ridge, damping in grid:
        key = {"criterion": criterion, "samples": samples, "ridge": ridge, "lambda": damping, **shared}
        found = None if given.again else results.find(key)
        if found is None and measured < given.limit:
            bench = bench or Bench(given, text.valid)
            found = bench.row(criterion, samples, ridge, damping)
            results.add(key, found)
            measured += 1
            gc.collect()
        if found is not None:
            say(f"{criterion:6} {samples:3} windows  {ridge:7} {damping:.3f}  {found['ratio']:.4f} x")


def _arguments() -> argparse.Namespace:
    parser = quality_options(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), help="calibration windows")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
