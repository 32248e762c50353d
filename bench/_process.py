"""Commands as processes of their own: the most memory that one ever held, its seconds, what it printed.

The peak is the kernel's high-water mark (VmHWM), read while the process runs and once more when it ends, because our
program resets that mark between its phases. While a process has children (some peers work in pools), their shares of
memory (Pss) count together. A script that measures so imports nothing heavy: a child inherits its parent's mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from _results import ROOT, WORK

PYTHON = sys.executable
PROGRAM = (PYTHON, "-m", "compress")
POLL = 0.01  # seconds between two looks at a process


@dataclass(frozen=True)
class Ran:
    """`peak`: bytes resident at most. `seconds`: wall time. `output`: its stdout."""

    peak: int
    seconds: float
    output: str

    def document(self) -> dict[str, Any]:
        """The JSON document in the last line of the output: libraries may print before it."""
        found: dict[str, Any] = json.loads(self.output.strip().splitlines()[-1])
        return found


def measured(command: Sequence[str], *, threads: int | None = None, log: Path | None = None) -> Ran:
    """Run `command` in the repository; subprocess.CalledProcessError for any exit code but 0.

    `threads` bounds what libraries start before anyone asks them; `log`: a file for stderr instead of the screen.
    """
    with tempfile.TemporaryFile() as output, contextlib.ExitStack() as stack:
        errors = None if log is None else stack.enter_context(log.open("wb"))
        limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors, env={**os.environ, **limits})
        peak = 0
        while True:
            # wait4 gives this child's own figure; getrusage would give the largest of all children so far
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _field(process.pid, "status", "VmHWM:"), _together(process.pid))
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(command))
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ran(max(peak, usage.ru_maxrss * 1024), seconds, text)


def recipe(name: str, document: Mapping[str, Any]) -> Path:
    """A recipe file of our program with this content."""
    path = WORK / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False))
    return path


def command(recipe: Path, out: Path, threads: int) -> list[str]:
    """Our command line that carries out `recipe`, taking nothing over from a run that was interrupted."""
    return [*PROGRAM, "run", str(recipe), "-o", str(out), "--overwrite", "--fresh", "-q", "--threads", str(threads)]


def planned(recipe: Path) -> dict[str, Any]:
    """What `plan RECIPE --json` says; `memory` is the estimated peak in bytes."""
    done = subprocess.run([*PROGRAM, "plan", str(recipe), "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def checkpoint(kind: str, folder: Path, layers: int) -> Path:
    """`folder`, with the checkpoint that bench/make_checkpoint.py writes; made when it is not there."""
    if not folder.exists():
        builder = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run([PYTHON, str(builder), kind, str(folder), "--layers", str(layers)], cwd=ROOT, check=True)
    return folder


def weights(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _together(pid: int) -> int:
    """Bytes that a process and its descendants hold now, what they share counted once; 0 while it has none."""
    family = [pid]
    for one in family:  # grows while it is walked
        with contextlib.suppress(OSError):  # it may end while we read, as below
            for file in Path(f"/proc/{one}/task").glob("*/children"):
                family += [int(child) for child in file.read_text().split()]
    return sum(_field(one, "smaps_rollup", "Pss:") for one in family) if len(family) > 1 else 0


def _field(pid: int, file: str, name: str) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0
