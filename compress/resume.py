"""What a run has finished and a later run may take over: steps and evaluations, by the content they were made from.

A step's key is a digest of the code, the libraries, the input's files, the options, the data, the seed and the threads:
everything its bytes depend on. Records lie in OUT.work beside the step's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.checkpoint.digests import digest
from compress.checkpoint.headers import read_header
from compress.checkpoint.writer import CARRIED, disk_errors, sync
from compress.data import DataSpec
from compress.machine import Machine, Progress, cpu_precision
from compress.plan import Plan
from compress.receipt import LIBRARIES
from compress.steps import STEPS
from compress.steps.types import StepPlan


@dataclass(frozen=True)
class Unit:
    """Steps that are carried out in one pass and leave one folder: one step, or a fused prune + quantize."""

    name: str  # of its folder: `2-quantize`
    steps: tuple[tuple[str, StepPlan], ...]  # (`1-prune`, its plan)
    key: str

    @property
    def last(self) -> int:
        """Number of its last step, from 1."""
        return int(self.name.split("-")[0])


class Work:
    """Records in the work folder."""

    def __init__(self, folder: Path, keep: bool = False) -> None:
        self.folder, self._keep = folder, keep

    def remove(self) -> None:
        """The folder goes, unless it is to be kept in any case."""
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def kept(self, useful: bool) -> str | None:
        """One line on what is kept for the next run; None, and no folder, if it is of no use."""
        if not useful:
            self.remove()
            return None
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return f"finished work is kept in {self.folder} ({size / 1e6:.1f} MB)"

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """What was recorded about a finished unit; None if it was made from something else."""
        return self._read(f"{unit.name}.json", unit.key)

    def finished(self, unit: Unit, record: Mapping[str, Any]) -> dict[str, Any]:
        """The unit's folder is whole and checked. Returns the record as a later run would read it."""
        self._write(f"{unit.name}.json", {"key": unit.key, **record})
        found = self.record(unit)
        assert found is not None
        return found

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The row measured under this key, and its seconds."""
        return self._read(f"evaluation-{key[:16]}.json", key)

    def evaluated(self, key: str, found: Mapping[str, Any]) -> None:
        self._write(f"evaluation-{key[:16]}.json", {"key": key, **found})

    def holds_something(self) -> bool:
        """Whether a later run could take anything over: a measurement, a step, or the state of one."""
        return any(path.suffix in (".json", ".state", ".training", ".written") for path in self.folder.iterdir())

    def finished_steps(self) -> bool:
        """Whether a whole step is there."""
        return any(re.fullmatch(r"\d+-\w+\.json", path.name) for path in self.folder.iterdir())

    def _read(self, name: str, key: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        file = self.folder / name
        partial = file.with_name(name + ".partial")
        with disk_errors(partial):
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            sync(partial)
            os.replace(partial, file)
            sync(self.folder)


def units(plan: Plan, machine: Machine, shard_bytes: int, progress: Progress) -> tuple[Unit, ...]:
    """The plan's steps as they are carried out, each with its key; the key of one is part of the next one's."""
    base = _base(plan, machine, shard_bytes)
    with progress.task("digests", 2) as task:
        key = source_key(plan)
        task.advance()
        teacher = None if plan.teacher is None else _folder(plan.teacher.folder)
        task.advance()
    names = [f"{index + 1}-{step.kind}" for index, step in enumerate(plan.steps)]
    made = []
    for group in plan.passes:
        part = []
        for index in group:
            step = plan.steps[index]
            spec = None if step.kind == "quantize" else getattr(plan.recipe.data, STEPS[step.kind].data)
            part.append(
                {
                    "step": names[index],
                    "options": step.options.model_dump(mode="json"),
                    "data": None if spec is None else data_key(spec),
                    "teacher": teacher if step.kind == "distill" else None,
                }
            )
        key = _key({"input": key, "base": base, "steps": part})
        made.append(Unit(names[group[-1]], tuple((names[i], plan.steps[i]) for i in group), key))
    return tuple(made)


def source_key(plan: Plan) -> str:
    """Digest of the files of the recipe's model."""
    return _folder(plan.source.folder)


def evaluation_key(plan: Plan, machine: Machine, stage: str) -> str:
    """Key of one measurement: of the folder made under the key `stage`, against the recipe's model."""
    spec = plan.recipe.data.evaluation
    return _key({"stage": stage, "base": _base(plan, machine, 0), "input": source_key(plan), "data": data_key(spec)})


def data_key(spec: DataSpec) -> dict[str, Any]:
    """A data source by its keys, and the digests of the local files it names."""
    sources = [spec.source] if isinstance(spec.source, str) else list(spec.source)
    files: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        inner = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        files |= {str(file): digest(file) for file in inner}
    return {"spec": spec.model_dump(mode="json"), "files": files}


def _base(plan: Plan, machine: Machine, shard_bytes: int) -> dict[str, Any]:
    return {
        "code": _code(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "precision": cpu_precision().reason,
        "threads": machine.threads,
        "seed": plan.recipe.seed,
        "shard_bytes": shard_bytes,
    }


def _folder(folder: Path) -> str:
    """Digest of all that a step reads of a checkpoint: weights, config, and what is carried over."""
    weights = {place.file for place in read_header(folder).locations.values()}
    carried = {path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    files = sorted({folder / "config.json", *weights, *carried})
    return _key([(file.name, digest(file)) for file in files])


@cache
def _code() -> str:
    root = Path(__file__).parent
    return _key(
        [(str(path.relative_to(root)), path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))]
    )


def _key(content: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
