"""What every peer script does around its own work: arguments, seconds of the work without imports, one JSON line.

    PYTHON run_NAME.py MODEL OUT METHOD --threads N [--calibration TEXT] [--judge TEXT --windows N]

Runs in the peers' environments, so it imports nothing but torch and the standard library. With --judge nothing is
timed: what the method makes in memory is judged by bench/judge.py, for what stock transformers does not load.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """`model`: the dense folder. `out`: the folder to write. `calibration`: text for methods that need some."""

    model: Path
    out: Path
    calibration: Path | None


Work = Callable[[Job], None]  # writes job.out
Make = Callable[[Path], Any]  # the model in memory that the same method makes of a dense folder


def main(methods: Mapping[str, Work], packages: tuple[str, ...], in_memory: Mapping[str, Make] | None = None) -> None:
    """Run the method that the command line names; the last line of stdout is its JSON document."""
    given = _arguments(methods)
    import torch

    torch.set_num_threads(given.threads)
    if given.judge is not None:
        make = (in_memory or {}).get(given.method)
        if make is None:
            raise SystemExit(f"{given.method} leaves no model in memory that could be judged")
        found = _judged(make(given.model), given.model, given.judge, given.windows)
    else:
        start = time.perf_counter()
        methods[given.method](Job(given.model, given.out, given.calibration))
        seconds = time.perf_counter() - start
        versions = {name: version(name) for name in (*packages, "torch", "transformers")}
        found = {"work_seconds": round(seconds, 2), "peer_versions": versions}
    print(json.dumps(found))


def _judged(model: Any, dense: Path, text: Path, windows: int) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from judge import evenly_spaced, judge, load

    rows = evenly_spaced(dense, text.read_text(encoding="utf-8"), windows)
    return judge(model.eval(), rows, load(dense))


def _arguments(methods: Mapping[str, Work]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("method", choices=list(methods))
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    return parser.parse_args()
