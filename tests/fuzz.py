"""Damaged checkpoints and damaged recipes, each run through the command line in a process of its own.

For tests/faults (some of them) and bench/fuzz.py (all). A case may end with exit 0 and a right result; with 2 (or 4)
and one line, or a list of problems, and OUT absent; with 3 where a recipe has gates. Never with a traceback, never with
1, never after `PATIENCE`. A case is its seed and its number: the same ones are damaged the same way anywhere.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from compress.checkpoint.headers import INDEX, SINGLE
from compress.errors import UserError
from compress.recipe import Recipe, loads, recipes
from tests import mutations
from tests.kills import PRELOADED

PATIENCE = 20.0  # seconds of processor time, or six times as many by the clock, after which a case counts as hanging
TOKENS = 30_000  # that a mutated recipe may ask for in all; one that wants more is only planned
SMALL = {
    "calibration": {"samples": 4, "length": 32},
    "training": {"samples": 4, "length": 32},
    "evaluation": {"samples": 2, "length": 32},
}


@dataclass(frozen=True)
class Outcome:
    """One case: what was damaged and run, how it ended (None: it hung), what was wrong with that, if anything."""

    case: str
    code: int | None
    seconds: float
    wrong: tuple[str, ...]
    said: str

    @property
    def ending(self) -> str:
        """Its row in a table of outcomes."""
        if self.wrong:
            return "WRONG"
        return {0: "done, as stock", 2: "refused", 3: "gate", 4: "machine"}.get(self.code or 0, "WRONG")


def checkpoints(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """`count` pico checkpoints whose headers, index or config have bytes changed or cut off; pruned or quantized."""
    from compress.stream.stock import quiet
    from tests import tiny

    with quiet():
        whole = [
            tiny.llama(folder / "llama"),
            tiny.llama(folder / "shards", shard="100KB", tie_word_embeddings=True),
            tiny.glm4v(folder / "glm4v"),
        ]
    server = start_server()
    for number in range(count):
        dice = random.Random(f"checkpoint {seed} {number}")
        source, out = folder / f"source-{number}", folder / f"out-{number}"
        shutil.copytree(dice.choice(whole), source)
        file = dice.choice(sorted(p for p in source.iterdir() if p.name in ("config.json", INDEX, SINGLE)))
        if file.name == INDEX and dice.random() < 0.5:
            file = dice.choice(sorted(source.glob("*.safetensors")))
        damage = mutations.damaged(file, dice)
        arguments = dice.choice(
            [
                ["prune", "--ffn", "0.3", "--samples", "4", "--length", "32"],
                ["quantize", "--format", "w8a16"],
            ]
        )
        command = [arguments[0], str(source), "-o", str(out), *arguments[1:], "--threads", "1", "-q"]
        case = f"checkpoint {number}: {file.name}, {damage}; {arguments[0]}"
        yield attempt(server, case, command, out, source)
        for left in (source, out):
            shutil.rmtree(left, ignore_errors=True)


def unlike_stock(source: Path, out: Path) -> list[str]:
    """What of a source that a step took stock transformers sees otherwise: nothing, if all is well."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    from compress.checkpoint.reader import Reader
    from compress.formats import open_stream
    from tests.stock import load, logits

    try:
        model = load(source)
    except Exception as error:  # whatever it raises, the source is none that it loads
        return [f"stock transformers does not load the source: {' '.join(str(error).split())[:300]}"]
    wrong = []
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with Reader(source) as reader:
        for file in {where.file for where in reader.header.locations.values()}:
            with safe_open(file, "pt") as stored:
                names = list(stored.keys())
                wrong += [n for n in names if not torch.equal(stored.get_tensor(n), reader.tensor(n))]
        expected, found = logits(model, {"input_ids": ids}), open_stream(reader, torch.float32).logits(ids)
    if not float((found - expected).abs().max()) <= 1e-4 * float(expected.std()):
        wrong.append("the streamed logits are not those of stock transformers")
    apart = {"intermediate_size", "quantization_config", "compression_config", "_name_or_path"}
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, out))
    for a, b in ((before, after), (before.get("text_config", {}), after.get("text_config", {}))):
        keys = (a.keys() | b.keys()) - apart - {"text_config"}
        wrong += [f"config: {key} {a.get(key)!r} -> {b.get(key)!r}" for key in keys if a.get(key) != b.get(key)]
    return wrong


def damaged_recipes(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """`count` shipped recipes, for pico models, with their structure or their bytes changed; planned, and run where
    they ask for little."""
    from compress.stream.stock import quiet
    from tests import tiny

    with quiet():
        models = {"llama": tiny.llama(folder / "llama"), "glm4v": tiny.glm4v(folder / "glm4v")}
    bases = [_for_pico(yaml.safe_load(file.read_text()), models) for _, file in sorted(recipes().items())]
    server = start_server()
    for number in range(count):
        dice = random.Random(f"recipe {seed} {number}")
        text = mutations.mutated(dice.choice(bases), dice)
        file, out = folder / f"recipe-{number}.yaml", folder / f"out-{number}"
        file.write_bytes(text)
        overrides = mutations.overrides(dice)
        wanted = [part for override in overrides for part in ("--set", override)]
        work = ["run", "-o", str(out), "--threads", "1", "-q"] if _cheap(text, overrides) else ["plan", "-q"]
        command = [work[0], str(file), *work[1:], *wanted]
        case = f"recipe {number}: {work[0]} {file.name} {' '.join(wanted)}".rstrip()
        yield attempt(server, case, command, out, None)
        shutil.rmtree(out, ignore_errors=True)


def _for_pico(recipe: dict[str, Any], models: dict[str, Path]) -> dict[str, Any]:
    """A shipped recipe with a pico model, little data, and counts that such a model has."""
    llama = recipe["model"].startswith("demo:")
    recipe |= {"model": str(models["llama" if llama else "glm4v"]), "data": SMALL}
    for step in recipe["steps"]:
        for kind, options in step.items():
            step[kind] = {k: v for k, v in (options or {}).items() if k not in ("keep_ffn", "keep_heads", "params")}
            if kind == "prune":
                step[kind] |= {"ratio": 0.4, "heads": 0.5} if llama else {"keep_ffn": 96}
            if kind == "distill":
                step[kind] |= {"max_steps": 2, "batch": 2}
    if "gates" in recipe:
        recipe["gates"] = {"max_kl": 100.0, "max_parameters": 10**9}
    return recipe


def _cheap(text: bytes, overrides: list[str]) -> bool:
    """Whether the recipe can be read, and asks for so little that its run takes seconds."""
    try:
        recipe = loads(text.decode(), overrides=overrides)
    except (UserError, UnicodeDecodeError):
        return False
    return _tokens(recipe) <= TOKENS


def _tokens(recipe: Recipe) -> float:
    sizes = {p: (s.samples or 10**9) * s.length for p, s in recipe.data}
    total = 0.0
    for step in recipe.steps:
        options: Any = step.options
        if step.kind == "prune":
            total += sizes["calibration"]
        if step.kind == "distill":
            batch = options.batch * recipe.data.training.length
            total += max(
                batch, sizes["training"] + min(options.epochs * sizes["training"], (options.max_steps or 10**9) * batch)
            )
    return total + (0 if recipe.evaluate == "never" else sizes["evaluation"] * (2 + len(recipe.steps)))


def start_server() -> Any:
    """What processes are forked from, started: its imports are no part of a case's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "transformers.models.llama.modeling_llama"])
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    return context


def attempt(server: Any, case: str, command: list[str], out: Path, source: Path | None) -> Outcome:
    """Run one command in a process of its own."""
    said, report = out.with_name(out.name + ".said"), out.with_name(out.name + ".report")
    process = server.Process(target=_child, args=(command, said, report, source, out), daemon=True)
    start = time.monotonic()
    process.start()
    while process.is_alive() and time.monotonic() - start < 6 * PATIENCE and _spent(process.pid) < PATIENCE:
        process.join(min(0.5, PATIENCE))
    seconds, code = time.monotonic() - start, process.exitcode
    if code is None:
        process.kill()
        process.join()
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    wrong = [*wrong_ending(code, text, out), *(json.loads(report.read_text()) if report.exists() else [])]
    return Outcome(case, code, seconds, tuple(wrong), text.strip())


def _spent(pid: int) -> float:
    """Seconds of processor time: other tests may run at the same time."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _child(command: list[str], said: Path, report: Path, source: Path | None, out: Path) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(descriptor, 2)
    os.chdir(out.parent)  # a mutated path is a path there
    from compress.cli import main

    code = main(command)
    if code == 0:
        check: Callable[[], list[str]] = (
            (lambda: unlike_stock(source, out)) if source else (lambda: _unlike_recipe(command, out))
        )
        report.write_text(json.dumps(check()))
    sys.exit(code)


def _unlike_recipe(command: list[str], out: Path) -> list[str]:
    """What a finished run leaves that its recipe did not say."""
    if command[0] == "plan":
        return []
    overrides = [word for flag, word in pairwise(command) if flag == "--set"]
    meant = loads(Path(command[1]).read_text(), overrides=overrides)
    kept = loads((out / "recipe.yaml").read_text())
    wrong = [] if kept == meant else ["the recipe beside the result is another one"]
    steps = json.loads((out / "receipt.json").read_text())["steps"]
    return wrong + ([] if len(steps) == len(meant.steps) else ["steps are missing in the receipt"])


def wrong_ending(code: int | None, said: str, out: Path) -> Iterator[str]:
    """What is wrong with how a case ended."""
    if code is None:
        yield f"it hung: still running after {PATIENCE:g} s of processor time, or six times as many by the clock"
        return
    if code not in (0, 2, 3, 4):
        yield f"exit code {code}"
    if "Traceback" in said:
        yield "a traceback"
    lines = [line for line in said.splitlines() if not line.startswith("hint: ")]
    if code in (2, 3, 4):
        listed = re.search(r"\b([0-9]+) (?:problems|gates failed)\b", lines[0]) if lines else None
        if not lines or not lines[0].startswith("error: ") or len(lines) != 1 + (int(listed[1]) if listed else 0):
            yield f"{len(lines)} lines, expected one, or a list and their number"
    if code in (2, 4) and out.exists():
        yield "OUT is there"
