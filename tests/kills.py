"""Kill a run at random moments and start it again: what is left must be what an uninterrupted run leaves.

`trials` drives recipes/glm4v-tiny-ci.yaml: for tests/faults a few times, as processes forked from one that has the
imports behind it, and for bench/kills.py many times, as the command itself. A kill is SIGKILL: nothing of ours runs
after it. Moments count from when OUT.work appears, so that none falls on the imports, and spread over the whole run.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "glm4v-tiny-ci.yaml"
APART = "measured.json"  # the only file of an OUT that may differ between two runs
POLL = 0.002  # seconds
PATIENCE = 600.0  # seconds after which a run counts as hanging

# What the server that runs are forked from has imported beforehand: each run then starts within a tenth of a second.
PRELOADED = [
    "compress.api",
    "compress.cli",
    "compress.commands.run",
    "compress.run",
    "compress.steps.distill.trainer",
    "compress.steps.prune.run",
    "compress.steps.quantize.run",
    "transformers.models.glm4v.modeling_glm4v",
    "bitsandbytes",
]


@dataclass(frozen=True)
class Trial:
    """One kill. `moment`: seconds after the work folder appeared. `stood`: what lay in it when the process was gone.
    `reused`: steps that the second run took over, `steps` of how many. `wrong`: what
    differs from an uninterrupted run; empty when nothing does."""

    moment: float
    stood: tuple[str, ...]
    reused: int
    steps: int
    wrong: tuple[str, ...]


class Running(Protocol):
    """A process of ours; exit codes as subprocess gives them, -9 for one that was killed."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...

    def kill(self) -> None: ...

    def send_signal(self, number: int, /) -> None: ...


# starts `autoglm-compress ARGUMENTS`, with what it says going to a file
Start = Callable[[Sequence[str], Path], Running]


def command(arguments: Sequence[str], log: Path) -> Running:
    """The command itself, from nothing."""
    with log.open("wb") as said:
        return subprocess.Popen([sys.executable, "-m", "compress", *arguments], cwd=ROOT, stdout=said, stderr=said)


def forked(arguments: Sequence[str], log: Path) -> Running:
    """The same, forked from a server that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(list(arguments), str(log)), daemon=True)
    process.start()
    return _Forked(process)


class _Forked:
    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"still running after {timeout:.0f} s")
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int, /) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _main(arguments: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    from compress.cli import main

    sys.exit(main(arguments))


def trials(folder: Path, count: int, *, seed: int = 0, start: Start = forked) -> Iterator[Trial]:
    """Make the model and an uninterrupted run in `folder`, then `count` runs that are killed and started again."""
    from tests import tiny

    model = tiny.glm4v(folder / "model")
    source, expected, span = digests(model), *_uninterrupted(folder, model, start)
    draw = random.Random(seed)
    for index in range(count):
        out, log = folder / f"killed-{index}", folder / f"killed-{index}.log"
        arguments, moment = _arguments(model, out), (index + draw.random()) / count * span
        while (code := _kill(arguments, out, log, moment, start)) in (0, -signal.SIGKILL) and out.exists():
            if differences := _differences(out, expected):
                raise RuntimeError(f"a run left an OUT that is not whole: {differences[0]}")
            shutil.rmtree(out)  # it was done by then: kill another one earlier
            shutil.rmtree(out.with_name(out.name + ".work"), ignore_errors=True)
            moment *= draw.random()
        stood = _standing(out.with_name(out.name + ".work"))
        if code == -signal.SIGKILL:
            code = start(arguments, log).wait(PATIENCE)
            wrong = [] if code == 0 else [f"exit code {code} when started again: {_last(log)}"]
            wrong += [f"left behind: {path.name}" for path in _beside(out)] + _differences(out, expected)
        else:
            wrong = [f"exit code {code} before it was killed: {_last(log)}"]
        wrong += [] if digests(model) == source else ["the source was changed"]
        yield Trial(round(moment, 3), stood, *_reused(out), tuple(wrong))
        shutil.rmtree(out, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but the one that holds times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != APART)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _differences(out: Path, expected: Mapping[str, str]) -> list[str]:
    found = digests(out)
    names = sorted(found.keys() | expected.keys())
    return [f"{name} differs" for name in names if found.get(name) != expected.get(name)]


def _arguments(model: Path, out: Path) -> list[str]:
    return [
        "run",
        str(RECIPE),
        "-o",
        str(out),
        "--set",
        f"model={model}",
        "--threads",
        "1",
        "--checkpoint-every",
        "0",
        "-q",
    ]


def _uninterrupted(folder: Path, model: Path, start: Start) -> tuple[dict[str, str], float]:
    """Digests of what a run leaves that nobody disturbs, and the seconds from its work folder to its OUT."""
    out, log = folder / "whole", folder / "whole.log"
    running = start(_arguments(model, out), log)
    _until(running, out.with_name(out.name + ".work"))
    begun = time.monotonic()
    _until(running, out)
    span = time.monotonic() - begun
    code = running.wait(PATIENCE)
    if code != 0:
        raise RuntimeError(f"the uninterrupted run ended with exit code {code}: {_last(log)}")
    return digests(out), span


def _kill(arguments: Sequence[str], out: Path, log: Path, moment: float, start: Start) -> int:
    """Start a run and kill it `moment` seconds after its work folder appeared; its exit code, 0 if it was faster."""
    running = start(arguments, log)
    _until(running, out.with_name(out.name + ".work"))
    time.sleep(moment)
    if running.poll() is None:
        running.kill()
    return running.wait(PATIENCE)


def _standing(work: Path) -> tuple[str, ...]:
    """The names in a work folder, digests left out."""
    names = {re.sub(r"-[0-9a-f]{16}\b", "", path.name) for path in work.glob("*")}
    return tuple(sorted(name for name in names if not name.startswith(".")))


def _until(running: Running, path: Path) -> None:
    """Wait for `path` to appear, or for the process to end without it."""
    give_up = time.monotonic() + PATIENCE
    while not path.exists() and running.poll() is None:
        if time.monotonic() > give_up:
            running.kill()
            raise TimeoutError(f"{path.name} did not appear within {PATIENCE:.0f} s")
        time.sleep(POLL)


def _reused(out: Path) -> tuple[int, int]:
    """Steps that the run took over from the one before it, and steps in all, as its measured.json has them."""
    file = out / APART
    steps = json.loads(file.read_text())["steps"] if file.exists() else []
    return sum(bool(step.get("taken_over")) for step in steps), len(steps)


def _beside(out: Path) -> list[Path]:
    """What a run left beside OUT: work folder, partial folder, lock."""
    names = (path for path in out.parent.iterdir() if out.name in path.name.split(".") and path != out)
    return sorted(path for path in names if path.suffix != ".log")


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"
