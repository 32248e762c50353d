"""300 damaged checkpoints and 300 damaged recipes through the command line, and how each of them ended.

    .venv/bin/python bench/fuzz.py [--count 300] [--seed 0]

Allowed: exit 0 where stock transformers loads the same source with the same config, tensors and logits; exit 2 (or 4)
with one line or a list of problems, and OUT absent; 3 for a recipe's gate. tests/fuzz.py damages, runs and judges.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import Results, options, say

from tests import fuzz

KINDS = {"checkpoints": fuzz.checkpoints, "recipes": fuzz.damaged_recipes}
ENDINGS = ("done, as stock", "refused", "gate", "machine", "WRONG")


def main() -> None:
    given = _arguments()
    results, wrong = Results("fuzz", given.results), 0
    say(f"{'':<12}" + "".join(f"{ending:>16}" for ending in ENDINGS))
    for kind in KINDS:
        key = {"kind": kind, "count": given.count, "seed": given.seed}
        found = None if given.again else results.find(key)
        if found is None:
            found = measure(kind, given.count, given.seed)
            results.add(key, found)
        wrong += found["endings"]["WRONG"]
        say(f"{kind:<12}" + "".join(f"{found['endings'][ending]:>16}" for ending in ENDINGS))
    if wrong:
        raise SystemExit(1)


def measure(kind: str, count: int, seed: int) -> dict[str, Any]:
    """How many ended how, what was wrong with which, and the slowest."""
    endings, wrong, slowest, start = collections.Counter(dict.fromkeys(ENDINGS, 0)), [], 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for outcome in KINDS[kind](Path(folder), count, seed):
            endings[outcome.ending] += 1
            slowest = max(slowest, outcome.seconds)
            if outcome.wrong:
                said = "; ".join(outcome.wrong)
                wrong.append({"case": outcome.case, "wrong": said, "said": outcome.said[-500:]})
                say(f"{outcome.case}: {said}\n    {outcome.said[-500:]}")
    seconds = round(time.monotonic() - start, 1)
    return {"endings": dict(endings), "wrong": wrong, "slowest_seconds": round(slowest, 2), "seconds": seconds}


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--count", type=int, default=300, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
