"""Executes a plan: steps into a work folder, evaluation and self-check after them, receipt, gates, one rename.

OUT appears whole or not at all. receipt.json is deterministic; what depends on the moment (seconds, peaks, host, date)
stands in measured.json.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress import receipt as receipts
from compress.arch import family_of
from compress.card import model_card
from compress.check import self_check
from compress.checkpoint.headers import read_header
from compress.checkpoint.layout import SHARD_BYTES
from compress.checkpoint.writer import sync
from compress.errors import GateError
from compress.machine import (
    Machine,
    Progress,
    Silent,
    peak_memory,
    reset_peak_memory,
    resident_memory,
)
from compress.output import check_apart, check_out, locked, publish, rejected, work_folder
from compress.plan import Plan, make_plan
from compress.recipe import Recipe, dump
from compress.steps import STEPS
from compress.steps.evaluate.run import Evaluator
from compress.steps.types import Job, StepPlan


@dataclass(frozen=True)
class Result:
    """Where the checkpoint is, its receipt, what was measured, and one row a stage."""

    out: Path
    receipt: dict[str, Any]
    measured: dict[str, Any]
    stages: tuple[dict[str, Any], ...]


def run(
    recipe: Recipe,
    out: Path,
    machine: Machine,
    *,
    overwrite: bool = False,
    keep_work: bool = False,
    progress: Progress | None = None,
    where: str | None = "recipe",
    shard_bytes: int = SHARD_BYTES,
) -> Result:
    """Run `recipe` into the folder `out`.

    Raises UserError (nothing written), MachineError, SelfCheckError; GateError when a gate fails: the result then
    lies in OUT.rejected.
    """
    progress = progress or Silent()
    check_out(out, overwrite)
    plan = make_plan(recipe, machine, progress=progress, where=where, out=out, shard_bytes=shard_bytes)
    check_apart(out, [plan.source, *([plan.teacher] if plan.teacher else [])])
    torch.set_num_threads(machine.threads)
    with locked(out), work_folder(out, keep_work) as work:
        execution = _Run(plan, _Place(out, work, keep_work, shard_bytes), machine, progress)
        try:
            return execution.finish()
        finally:
            execution.close()


@dataclass(frozen=True)
class _Place:
    """Where a run works and where its result goes."""

    out: Path
    work: Path
    keep_work: bool
    shard_bytes: int


class _Run:
    """One execution; the state that its phases share."""

    def __init__(self, plan: Plan, place: _Place, machine: Machine, progress: Progress) -> None:
        self.plan, self.recipe, self.place, self.machine, self.progress = plan, plan.recipe, place, machine, progress
        self.stages: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.measured: dict[str, Any] = {"steps": []}
        self.evaluator: Evaluator | None = None

    def close(self) -> None:
        """Let go of the reference's files and hidden states."""
        if self.evaluator is not None:
            self.evaluator.close()

    def finish(self) -> Result:
        """All phases in order."""
        started = time.time()
        for note in self.plan.notes:
            self.progress.note(note)
        if self.recipe.evaluate != "never":
            reference = self.plan.source.folder
            self.evaluator = Evaluator(
                reference,
                self.recipe.data.evaluation,
                seed=self.recipe.seed,
                reference=reference,
                progress=self.progress,
            )
            self._evaluate("dense", reference)
        folder = self.plan.source.folder
        for index, step in enumerate(self.plan.steps):
            folder = self._step(index, step, folder)
        failed = receipts.failed_gates(self.recipe, self.stages, self.plan.steps[-1])
        receipt = self._receipt(folder, failed)
        self.measured |= receipts.measured_host(self.machine, started)
        self._describe(folder, receipt)
        target = rejected(self.place.out) if failed else self.place.out
        publish(folder, target)
        sync(target.parent)
        result = Result(target, receipt, self.measured, tuple(self._rows()))
        if failed:
            head = f"{failed[0]}; the result lies in {target}"
            if len(failed) > 1:
                head = "\n".join([f"{len(failed)} gates failed; the result lies in {target}", *failed])
            raise GateError(head, result=result)
        return result

    def _step(self, index: int, step: StepPlan, source: Path) -> Path:
        name = f"{index + 1}-{step.kind}"
        target = self.place.work / name
        step = replace(step, before=read_header(source))  # as planned, now with the places of its bytes
        self.progress.note(f"{name}: {step.kind}")
        data = {part: getattr(self.recipe.data, part) for part in ("calibration", "training", "evaluation")}
        teacher = self.plan.teacher.folder if self.plan.teacher else None
        job = Job(
            plan=step,
            family=family_of(step.before),
            source=source,
            target=target,
            teacher=teacher,
            data=data,
            seed=self.recipe.seed,
            machine=self.machine,
            progress=self.progress,
            shard_bytes=self.place.shard_bytes,
        )
        work = STEPS[step.kind].load()
        before, start = resident_memory(), time.time()
        reset_peak_memory()
        outcome = work(job)
        seconds, peak = time.time() - start, peak_memory()
        checked, full_load = self_check(target, step, outcome, self.machine, self.progress)
        self.measured["steps"].append(
            {
                "step": name,
                "seconds": round(seconds, 2),
                "check_seconds": round(time.time() - start - seconds, 2),
                "memory_before": before,
                "memory_peak": peak,
                "memory_predicted": step.memory,
                "full_load": full_load,
                **outcome.measured,
            }
        )
        self.steps.append(receipts.step_part(name, step, outcome.receipt, checked))
        _keep_scores(target, source)
        if index and not self.place.keep_work:
            shutil.rmtree(source)
        last = index + 1 == len(self.plan.steps)
        if self.recipe.evaluate == "each" or (self.recipe.evaluate == "last" and last):
            self._evaluate(name, target)
        return target

    def _evaluate(self, stage: str, folder: Path) -> None:
        assert self.evaluator is not None
        start = time.time()
        row = {"stage": stage, **self.evaluator.measure(folder, stage)}
        self.stages.append(row)
        self.measured.setdefault("evaluation_seconds", {})[stage] = round(time.time() - start, 2)

    def _receipt(self, folder: Path, failed: list[str]) -> dict[str, Any]:
        return receipts.assemble(
            plan=self.plan,
            threads=self.machine.threads,
            shard_bytes=self.place.shard_bytes,
            steps=self.steps,
            stages=self.stages,
            evaluation_digest=self.evaluator.tokens.digest if self.evaluator else None,
            failed=failed,
            folder=folder,
            progress=self.progress,
        )

    def _describe(self, folder: Path, receipt: dict[str, Any]) -> None:
        """recipe.yaml, receipt.json, measured.json and the model card, synced."""
        texts = {
            "recipe.yaml": dump(self.recipe),
            "receipt.json": json.dumps(receipts.finite(receipt), indent=1, sort_keys=True) + "\n",
            "measured.json": json.dumps(receipts.finite(self.measured), indent=1) + "\n",
            "README.md": model_card(receipt, self.plan.source.folder),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            sync(folder / name)
        sync(folder)

    def _rows(self) -> Iterator[dict[str, Any]]:
        seconds = {step["step"]: step["seconds"] for step in self.measured["steps"]}
        measured = {row["stage"]: row for row in self.stages}
        if "dense" in measured:
            yield measured["dense"]
        for step in self.steps:
            row = {"stage": step["step"], "parameters": step["parameters"], "bytes": step["bytes"]}
            yield row | measured.get(step["step"], {}) | {"seconds": seconds[step["step"]]}


def _keep_scores(target: Path, source: Path) -> None:
    """The scores of earlier prune steps follow the checkpoint through later steps."""
    if source.parent == target.parent and (source / "sensitivity").exists():
        shutil.copytree(source / "sensitivity", target / "sensitivity", dirs_exist_ok=True)
        for path in sorted((target / "sensitivity").rglob("*")):
            sync(path)


__all__ = ["Result", "run"]
