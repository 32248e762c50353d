"""Executes a plan: steps into a work folder, evaluation and self-check after them, receipt, gates, one rename.

OUT appears whole or not at all. What a killed run had finished is taken over by the next one (resume.py). receipt.json
is deterministic; what depends on the moment (seconds, peaks, host, date) stands in measured.json.
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
from compress import resume
from compress.arch import family_of
from compress.card import model_card
from compress.check import check_source, self_check
from compress.checkpoint.digests import ahead
from compress.checkpoint.disk import sync
from compress.checkpoint.headers import read_header
from compress.checkpoint.layout import SHARD_BYTES
from compress.checkpoint.ledger import EVERY, Ledger
from compress.device import device_of, peak_of, reset_peak
from compress.errors import GateError, UserError
from compress.machine import Machine, Progress, Silent, peak_memory, reset_peak_memory, resident_memory, torch_threads
from compress.output import claimed, publish, rejected, work_folder
from compress.plan import Plan
from compress.prepare import prepare
from compress.recipe import Recipe, dump
from compress.resume import Unit, Work
from compress.steps import STEPS
from compress.steps.evaluate.run import Evaluator
from compress.steps.types import Job, Outcome


@dataclass(frozen=True)
class Result:
    """Where the checkpoint is, its receipt, what was measured, and one row a stage.

    `receipt` is empty when the run was told to stop before its end: `out` is then the last step's folder.
    """

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
    fresh: bool = False,
    discard: bool = False,
    wait: bool = False,
    stop_after: int | None = None,
    checkpoint_every: float = EVERY,
    progress: Progress | None = None,
    where: str | None = "recipe",
    shard_bytes: int = SHARD_BYTES,
) -> Result:
    """Run `recipe` into the folder `out`.

    What an earlier run of the same recipe finished in OUT.work is taken over, unless `fresh`; an interrupted or failed
    run leaves it there, unless `discard`. `stop_after` steps the run ends and keeps its work; `wait` for another run
    that writes `out`; a running step saves its state about every `checkpoint_every` seconds.

    Raises UserError (nothing written), MachineError, SelfCheckError; GateError when a gate fails: the result then
    lies in OUT.rejected, from where a run with other gates takes it. KeyboardInterrupt carries a line on what is kept.
    """
    progress = progress or Silent()
    plan = prepare(
        recipe,
        out,
        machine,
        overwrite=overwrite,
        stop_after=stop_after,
        progress=progress,
        where=where,
        shard_bytes=shard_bytes,
    )
    torch.set_num_threads(machine.threads)
    with claimed(out, overwrite, wait, progress):
        work = Work(work_folder(out, fresh), keep=keep_work)
        place = _Place(out, keep_work, shard_bytes, stop_after, checkpoint_every)
        execution = _Run(plan, place, work, machine, progress)
        try:
            with work.keeping(discard):
                result = execution.finish()
        finally:
            execution.close()
        if result.receipt:
            work.remove()
        return result


@dataclass(frozen=True)
class _Place:
    """Where the result goes, and how."""

    out: Path
    keep_work: bool
    shard_bytes: int
    stop_after: int | None
    checkpoint_every: float


class _Run:
    """One execution; the state that its phases share."""

    def __init__(self, plan: Plan, place: _Place, work: Work, machine: Machine, progress: Progress) -> None:
        self.plan, self.recipe, self.place, self.work = plan, plan.recipe, place, work
        self.machine, self.progress = machine, progress
        self.units: tuple[Unit, ...] = ()
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
        started, folder = time.time(), self.plan.source.folder
        self._begin(folder)
        taken_over = self._taken_over()
        for index, unit in enumerate(self.units):
            folder = self._unit(unit, folder, taken_over=index < taken_over)
            if self.place.stop_after is not None and self.place.stop_after <= unit.last < len(self.plan.steps):
                if not folder.is_dir():
                    later = self.units[taken_over - 1].name
                    raise UserError(
                        f"--stop-after: {unit.name} is over and its folder gone; an earlier run went on to {later}",
                        hint="--fresh starts over; --keep-work keeps the steps' folders",
                    )
                self.progress.note(f"stopped after {unit.name}; the same command without --stop-after goes on")
                return Result(folder, {}, self.measured, tuple(self._rows()))
        failed = receipts.failed_gates(self.recipe, self.stages, self.plan.steps[-1])
        receipt = self._receipt(folder, failed)
        if folder.parent != self.work.folder:
            folder = self.work.take_back(self.units[-1], folder)
        self.measured |= receipts.measured_host(self.machine, started)
        self._describe(folder, receipt)
        target = rejected(self.place.out) if failed else self.place.out
        if failed:
            self.work.reject(self.units[-1], target)
        else:
            publish(folder, target)
        sync(target.parent)
        result = Result(target, receipt, self.measured, tuple(self._rows()))
        if failed:
            head = f"{failed[0]}; the result lies in {target}"
            if len(failed) > 1:
                head = "\n".join([f"{len(failed)} gates failed; the result lies in {target}", *failed])
            raise GateError(head, result=result)
        return result

    def _begin(self, source: Path) -> None:
        """Check what is read, and measure the model as it is."""
        for note in self.plan.notes:
            self.progress.note(note)
        resume.hash_sources(self.plan)
        for folder in dict.fromkeys(source.folder for source in (self.plan.source, self.plan.teacher) if source):
            check_source(folder)
        self.units = resume.units(self.plan, self.machine, self.place.shard_bytes)
        if self.recipe.evaluate != "never" or self.work.holds_something():
            resume.wait_for_keys(self.units, self.progress)
        if self.recipe.evaluate != "never":
            data, seed, device = self.recipe.data.evaluation, self.recipe.seed, device_of(self.machine)
            self.evaluator = Evaluator(source, data, seed=seed, reference=source, device=device, progress=self.progress)
            self._evaluate("dense", source, resume.source_key(self.plan))

    def _taken_over(self) -> int:
        """How many units an earlier run has finished: the folder of the last one is there, and all that the receipt
        says of those before it."""
        for count in range(len(self.units), 0, -1):
            done = self.units[:count]
            recorded = all(self.work.record(unit) for unit in done)
            # what is to be measured of an earlier one was measured, or still can be
            measured = all(
                (self.work.folder / unit.name).is_dir() or self._measurement(unit)
                for unit in done[:-1]
                if self._is_evaluated(unit)
            )
            if recorded and measured and self._is_there(done[-1]):
                return count
        return 0

    def _is_there(self, unit: Unit) -> bool:
        """Whether the unit's folder is in OUT.work, or as it was in OUT.rejected."""
        if (self.work.folder / unit.name).is_dir():
            return True
        return unit is self.units[-1] and self.work.is_rejected(unit, rejected(self.place.out))

    def _unit(self, unit: Unit, source: Path, taken_over: bool) -> Path:
        target = self.work.folder / unit.name
        record = self.work.record(unit) if taken_over else None
        if record is None:
            record = self.work.finished(unit, self._carry_out(unit, source, target))
            if source.parent == target.parent and not self.place.keep_work:
                shutil.rmtree(source, ignore_errors=True)
        else:
            self.progress.note(f"{unit.name}: taken over from an earlier run")
            if unit is self.units[-1] and not target.is_dir():
                target = rejected(self.place.out)  # measured where it lies: whatever happens, it is not lost
            record["measured"] = [{**measured, "taken_over": True} for measured in record["measured"]]
        self.steps += record["receipt"]
        self.measured["steps"] += record["measured"]
        if self._is_evaluated(unit):
            self._evaluate(unit.name, target, unit.key)
        return target

    def _is_evaluated(self, unit: Unit) -> bool:
        return self.recipe.evaluate == "each" or (self.recipe.evaluate == "last" and unit is self.units[-1])

    def _carry_out(self, unit: Unit, source: Path, target: Path) -> dict[str, Any]:
        """The unit's work and its self-check; its parts of receipt.json and measured.json, one a step."""
        name, step = unit.steps[0]
        before = read_header(source)  # as planned, now with the places of its bytes, and what an earlier step found
        step = replace(step, before=before, after=family_of(step.after).with_lists(step.after, before.config))
        self.progress.note(f"{unit.name}: {' and '.join(planned.kind for _, planned in unit.steps)}")
        for _, planned in unit.steps:  # what the plan says and warns of, for those who never asked for it
            for note in (receipts.changes(planned), *planned.notes):
                self.progress.note(f"  {note}")
        ledger = Ledger(self.work.folder / f"{unit.name}.state", lambda: unit.key, self.place.checkpoint_every)
        written = Ledger(self.work.folder / f"{unit.name}.written", lambda: unit.key)
        job = Job(
            plan=step,
            family=family_of(step.before),
            source=source,
            target=target,
            teacher=self.plan.teacher.folder if self.plan.teacher else None,
            data={part: getattr(self.recipe.data, part) for part in ("calibration", "training", "evaluation")},
            seed=self.recipe.seed,
            machine=self.machine,
            progress=self.progress,
            shard_bytes=self.place.shard_bytes,
            name=name,
            ledger=ledger,
            pack=unit.steps[1][1] if len(unit.steps) > 1 else None,
        )
        self.work.begin(unit, ledger, written)
        outcome = resume.outcome_of(written) if target.is_dir() else None
        if outcome is None:
            outcome = self._work(job, written)
        start = time.time()
        try:
            ahead(sorted(target.glob("*.safetensors")))  # for the receipt, beside the check
            memory = min(self.plan.memory or 0, self.machine.available_memory())
            with torch_threads(self.machine.threads - 1):
                checked, stock_load = self_check(target, unit.steps[-1][1], outcome, memory, self.progress)
        finally:
            written.forget()  # should the check fail, the same code would write the same again
        resume.carry_scores(source, target)
        measured = {
            "step": unit.name,
            **outcome.measured,
            "check_seconds": round(time.time() - start, 2),
            "memory_predicted": max(step.memory for _, step in unit.steps),
            "stock_load": stock_load,
        }
        return {"receipt": self._parts(unit, outcome, checked), "measured": [measured]}

    def _work(self, job: Job, written: Ledger) -> Outcome:
        """Do the step, and keep what the self-check needs of it."""
        shutil.rmtree(job.target, ignore_errors=True)  # whole, but what the self-check needs of it is not there
        work = STEPS[job.plan.kind].load()
        before, start = resident_memory(), time.time()
        device = device_of(self.machine)
        reset_peak_memory()
        reset_peak(device)
        outcome = work(job)
        measured = {"seconds": round(time.time() - start, 2), "memory_before": before, "memory_peak": peak_memory()}
        measured |= peak_of(device)
        outcome = replace(outcome, measured={**measured, **outcome.measured})
        resume.save_outcome(written, outcome)
        if job.ledger is not None:
            job.ledger.forget()
        return outcome

    def _parts(self, unit: Unit, outcome: Outcome, checked: dict[str, Any]) -> list[dict[str, Any]]:
        parts = []
        for (name, step), found in zip(unit.steps, (outcome.receipt, *outcome.packed), strict=True):
            last = name == unit.name
            parts.append(receipts.step_part(name, step, found, checked if last else {"with": unit.name}))
        return parts

    def _evaluate(self, stage: str, folder: Path, key: str) -> None:
        """Measure `folder`, or take over what was measured of the same bytes."""
        assert self.evaluator is not None
        key = resume.evaluation_key(self.plan, self.machine, key)
        found = self.work.evaluation(key)
        if found is None:
            start = time.time()
            row = self.evaluator.measure(folder, stage)
            found = {"row": row, "seconds": round(time.time() - start, 2)}
            self.work.evaluated(key, found)
        self.stages.append({"stage": stage, **found["row"]})
        self.measured.setdefault("evaluation_seconds", {})[stage] = found["seconds"]

    def _measurement(self, unit: Unit) -> dict[str, Any] | None:
        return self.work.evaluation(resume.evaluation_key(self.plan, self.machine, unit.key))

    def _receipt(self, folder: Path, failed: list[str]) -> dict[str, Any]:
        return receipts.assemble(
            plan=self.plan,
            threads=self.machine.threads,
            device=device_of(self.machine),
            shard_bytes=self.place.shard_bytes,
            steps=self.steps,
            stages=self.stages,
            evaluation_digest=self.evaluator.tokens.digest if self.evaluator else None,
            evaluation_revisions=self.evaluator.tokens.revisions if self.evaluator else {},
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
            yield row | measured.get(step["step"], {}) | {"seconds": seconds.get(step["step"])}


__all__ = ["Result", "run"]
