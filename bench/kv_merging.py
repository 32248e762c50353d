"""KV heads of SmolLM2-135M, 3 -> 1: averaged, aligned or dropped, with the refit of o_proj and without.

    .venv/bin/python bench/kv_merging.py [--limit 1]

One-shot, no training. Calibrated on 64 windows of 512 tokens of wikitext2-valid.txt, judged on 64 of the test file,
by stock transformers. `mean` without the refit is plain averaging (Ainslie et al. 2023, before their training).
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from pathlib import Path
from typing import Any

from _results import WORK, Results, say
from _texts import quality_options, wikitext
from judge import evenly_spaced, judge, load

import compress
from compress.checkpoint.source import locate
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.steps.prune.options import PruneOptions

KEEP = 1
SAMPLES = 64
SETTINGS = [(method, refit) for method in ("mean", "aligned", "drop") for refit in (False, True)]


class Bench:
    """Judged windows, the dense model's perplexity on them, and how a row is measured."""

    def __init__(self, given: argparse.Namespace, valid: Path, test: Path, dense: float | None) -> None:
        self.given, self.valid = given, valid
        self.folder = locate(given.model).folder
        self.rows = evenly_spaced(self.folder, test.read_text(encoding="utf-8"), given.windows)
        self.dense = dense or judge(load(self.folder), self.rows)["ppl"]

    def row(self, method: str, refit: bool) -> dict[str, Any]:
        """Merge so, judge the result, and count the bytes of its cache."""
        options = PruneOptions(keep_kv_heads=KEEP, kv_merge=method, refit=refit)
        machine = Machine.detect(self.given.threads)
        planned = make_plan(Recipe.single("prune", self.given.model, options), machine, check_machine=False)
        out, started = WORK / "kv-merging", time.time()
        result = compress.prune(
            self.given.model,
            out,
            **options.model_dump(exclude_defaults=True),
            data={"source": str(self.valid), "samples": SAMPLES, "length": self.given.length},
            seed=self.given.seed,
            machine=machine,
            overwrite=True,
        )
        seconds = time.time() - started
        found = judge(load(out), self.rows)
        shutil.rmtree(out)
        gc.collect()
        return {
            "perplexity": found["ppl"],
            "dense": self.dense,
            "ratio": found["ppl"] / self.dense,
            "parameters": found["params"],
            "kv_cache_bytes": list(planned.kv_cache),
            "errors": result.receipt["steps"][0].get("kv_merge", {}).get("errors", {}),
            "seconds": round(seconds, 1),
            "threads": self.given.threads,
        }


def main() -> None:
    parser = quality_options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="chooses the calibration windows")
    parser.add_argument("--only", choices=("mean", "aligned", "drop"), help="measure this method alone")
    given = parser.parse_args()
    texts = wikitext(given.data)
    if texts is None:
        return
    results, done = Results("kv_merging", given.results), 0
    bench: Bench | None = None
    for method, refit in [setting for setting in SETTINGS if given.only in (None, setting[0])]:
        key = {"keep": KEEP, "method": method, "refit": refit, "samples": SAMPLES, "seed": given.seed}
        key |= {"model": given.model, "windows": given.windows, "length": given.length}
        if (results.find(key) is None or given.again) and done < given.limit:
            like = {name: key[name] for name in ("model", "windows", "length")}
            known = [row["found"]["dense"] for row in results.rows if like.items() <= row["key"].items()]
            bench = bench or Bench(given, texts.valid, texts.test, known[0] if known else None)
            results.add(key, bench.row(method, refit))
            done += 1
        if found := results.find(key):
            before, after = found["kv_cache_bytes"]
            how = "with refit" if refit else "no refit"
            say(f"{method:8} {how:10} {found['ratio']:8.3f} x dense, KV cache {before:,} -> {after:,} bytes a token")


if __name__ == "__main__":
    main()
