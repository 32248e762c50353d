"""kill -9 at 20 random moments of recipes/glm4v-tiny-ci.yaml, each followed by the same command once more.

    .venv/bin/python bench/kills.py [--kills 20] [--seed 0]

Every second run must end with exit code 0 and the bytes of an uninterrupted run (all of OUT but measured.json), the
source untouched, nothing left beside OUT. A run that is done before its moment does not count: another one is killed
earlier in its place. tests/kills.py does the work; here every run is the command itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from _results import ROOT, Results, options, say

from tests import kills


def main() -> None:
    given = _arguments()
    results = Results("kills", given.results)
    key = {"recipe": str(kills.RECIPE.relative_to(ROOT)), "killed": given.kills, "seed": given.seed}
    found = None if given.again else results.find(key)
    if found is None:
        found = measure(given.kills, given.seed)
        results.add(key, found)
    say(f"{found['same']} of {given.kills} end with the same bytes; {found['reused']} of {found['steps']} steps reused")
    if found["same"] != given.kills:
        raise SystemExit(1)


def measure(count: int, seed: int) -> dict[str, Any]:
    """All trials, and how many left what an uninterrupted run leaves."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for trial in kills.trials(Path(folder), count, seed=seed, start=kills.command):
            rows.append(dataclasses.asdict(trial))
            stood = ", ".join(trial.stood) or "nothing"
            verdict = "; ".join(trial.wrong) or "same bytes"
            say(
                f"killed after {trial.moment:6.2f} s ({stood}): {verdict}; {trial.reused} of {trial.steps} steps reused"
            )
    return {
        "same": sum(not row["wrong"] for row in rows),
        "reused": sum(row["reused"] for row in rows),
        "steps": sum(row["steps"] for row in rows),
        "trials": rows,
    }


def _arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
