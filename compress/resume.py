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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.checkpoint.digests import ahead, digest
from compress.checkpoint.disk import disk_errors, sync
from compress.checkpoint.headers import read_header
from compress.checkpoint.ledger import Ledger
from compress.checkpoint.writer import CARRIED
from compress.data import BUILTIN, DataSpec, builtin_parts, commits, pictures_of
from compress.device import described, device_errors, device_of, precision_of
from compress.errors import GateError, MachineError, UserError, size
from compress.machine import Machine, Progress
from compress.output import RECEIPT, publish
from compress.plan import Plan
from compress.receipt import LIBRARIES, unchanged
from compress.steps import STEPS
from compress.steps.types import Outcome, StepPlan


@dataclass(frozen=True)
class Unit:
    """Steps that are carried out in one pass and leave one folder: one step, or a fused prune + quantize."""

    name: str  # of its folder: `2-quantize`
    steps: tuple[tuple[str, StepPlan], ...]  # (`1-prune`, its plan)
    made_from: Callable[[], Mapping[str, Any]]

    @cached_property
    def key(self) -> str:
        """Digest of all that its bytes depend on; the first to ask may wait for the digests of large files."""
        return key_of(self.made_from())

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
        held = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return f"finished work is kept in {self.folder} ({size(held)})"

    @contextmanager
    def keeping(self, discard: bool) -> Iterator[None]:
        """What becomes of the folder where the work inside fails: kept if a later run can go on from there, unless
        `discard`. The hint of an error, and KeyboardInterrupt, then carry a line on it."""
        try:
            with device_errors():
                yield
        except GateError as error:
            if self.kept(not discard):  # the records; the last step's folder is the result that was rejected
                error.hint = "where gates alone are changed, the same command repeats no step"
            raise
        except (UserError, MachineError) as error:
            # a wrong input is mended before the next run: only whole steps can be of use to it
            useful = self.finished_steps() if isinstance(error, UserError) else self.holds_something()
            if kept := self.kept(useful and not discard):
                error.hint = f"{error.hint}; {kept}" if error.hint else f"{kept}: the same command goes on from there"
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.kept(self.holds_something() and not discard) or "") from None
        except BaseException:
            self.kept(self.holds_something() and not discard)
            raise

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """What was recorded about a finished unit; None if it was made from something else."""
        name = f"{unit.name}.json"
        return self._read(name, unit.key) if (self.folder / name).is_file() else None

    def begin(self, unit: Unit, state: Ledger, written: Ledger) -> None:
        """The unit's work begins. What lies under its name and was made under another key goes first: a record or a
        state of that key would otherwise vouch for the weights that this run puts beside it."""
        folder = self.folder / unit.name
        (self.folder / f"{unit.name}.json").unlink(missing_ok=True)
        for ledger in (state, written):
            if not ledger.holds():
                ledger.file.unlink(missing_ok=True)
        if not state.file.exists():
            shutil.rmtree(folder.with_name(f"{unit.name}.partial"), ignore_errors=True)
        if not written.file.exists():
            shutil.rmtree(folder, ignore_errors=True)
        sync(self.folder)

    def finished(self, unit: Unit, record: Mapping[str, Any]) -> dict[str, Any]:
        """The unit's folder is whole and checked. Returns the record as a later run would read it."""
        self._write(f"{unit.name}.json", {"key": unit.key, **record})
        found = self.record(unit)
        assert found is not None
        return found

    def reject(self, unit: Unit, rejected: Path) -> None:
        """The folder of the last unit, described by its receipt, becomes `rejected`; on record, for `is_rejected`."""
        folder = self.folder / unit.name
        record = self.record(unit)
        assert record is not None
        self._write(f"{unit.name}.json", record | {"rejected": digest(folder / RECEIPT)})
        publish(folder, rejected)

    def is_rejected(self, unit: Unit, rejected: Path) -> bool:
        """Whether what lies there is still what `reject` put there, to the byte."""
        record = self.record(unit)
        if record is None or not (rejected / RECEIPT).is_file():
            return False
        return record.get("rejected") == digest(rejected / RECEIPT) and unchanged(rejected)

    def take_back(self, unit: Unit, rejected: Path) -> Path:
        """Undo `reject`; returns the unit's folder."""
        folder = self.folder / unit.name
        os.rename(rejected, folder)
        return folder

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The row measured under this key, and its seconds."""
        return self._read(f"evaluation-{key[:16]}.json", key)

    def evaluated(self, key: str, found: Mapping[str, Any]) -> None:
        self._write(f"evaluation-{key[:16]}.json", {"key": key, **found})

    def holds_something(self) -> bool:
        """Whether a later run could take anything over: a measurement, a step, or the state of one."""
        return any(
            path.suffix in (".json", ".state", ".written") or (path.suffix == ".training" and any(path.iterdir()))
            for path in self.folder.iterdir()
        )

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


def save_outcome(written: Ledger, outcome: Outcome) -> None:
    """Keep what the self-check needs of a step whose folder is whole."""
    facts = {"receipt": outcome.receipt, "measured": outcome.measured, "packed": list(outcome.packed)}
    written.save(facts, {"probe": outcome.probe, "logits": outcome.logits})


def outcome_of(written: Ledger) -> Outcome | None:
    """What `save_outcome` kept, when the run ended before the folder was checked."""
    state = written.load()
    if state is None:
        return None
    facts, tensors = state.facts, state.tensors
    return Outcome(facts["receipt"], tensors["probe"], tensors["logits"], facts["measured"], tuple(facts["packed"]))


def carry_scores(source: Path, target: Path) -> None:
    """The scores of earlier prune steps follow the checkpoint from one folder of OUT.work to the next."""
    if source.parent == target.parent and (source / "sensitivity").exists():
        shutil.copytree(source / "sensitivity", target / "sensitivity", dirs_exist_ok=True)
        for path in sorted((target / "sensitivity").rglob("*")):
            sync(path)


def units(plan: Plan, machine: Machine, shard_bytes: int) -> tuple[Unit, ...]:
    """The plan's steps as they are carried out, each with its key; the key of one is part of the next one's."""
    base = surroundings(machine, plan.recipe.seed) | {"shard_bytes": shard_bytes}
    names = [f"{index + 1}-{step.kind}" for index, step in enumerate(plan.steps)]
    made: list[Unit] = []
    for group in plan.passes:
        steps = tuple((names[index], plan.steps[index]) for index in group)

        def made_from(steps: Any = steps, earlier: Unit | None = made[-1] if made else None) -> dict[str, Any]:
            key = source_key(plan) if earlier is None else earlier.key
            return {"input": key, "base": base, "steps": [_step(plan, name, step) for name, step in steps]}

        made.append(Unit(names[group[-1]], steps, made_from))
    return tuple(made)


def _step(plan: Plan, name: str, step: StepPlan) -> dict[str, Any]:
    """What one step's bytes depend on, besides its input."""
    spec = None if step.kind == "quantize" else getattr(plan.recipe.data, STEPS[step.kind].data)
    learns = step.kind == "distill" and plan.teacher is not None
    return {
        "step": name,
        "options": step.options.model_dump(mode="json"),
        "made_with": dict(step.made_with),
        "data": None if spec is None else data_key(spec),
        "teacher": folder_key(plan.teacher.folder) if learns and plan.teacher else None,
    }


def wait_for_keys(units: Sequence[Unit], progress: Progress) -> None:
    """Show that digests are waited for."""
    with progress.task("digests", len(units)) as task:
        for unit in units:
            assert unit.key
            task.advance()


def hash_sources(plan: Plan) -> None:
    """Begin with the digests of the model and the teacher, beside what is done first."""
    ahead(path for source in (plan.source, plan.teacher) if source for path in _files(source.folder))


def source_key(plan: Plan) -> str:
    """Digest of the files of the recipe's model."""
    return folder_key(plan.source.folder)


def evaluation_key(plan: Plan, machine: Machine, stage: str) -> str:
    """Key of one measurement: of the folder made under the key `stage`, against the recipe's model."""
    spec = plan.recipe.data.evaluation
    base = surroundings(machine, plan.recipe.seed)
    return key_of({"stage": stage, "base": base, "input": source_key(plan), "data": data_key(spec)})


def data_key(spec: DataSpec) -> dict[str, Any]:
    """A data source by its keys, the digests of the local files it names, of their images and of the builtin text, of
    which every version of Python has its own, and the commits of the hub's datasets."""
    sources = [spec.source] if isinstance(spec.source, str) else list(spec.source)
    files: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        inner = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        files |= {str(file): digest(file) for file in inner}
    files |= {str(image.path): digest(image.path) for image in pictures_of(spec)}
    own = key_of({part: list(texts) for part, texts in builtin_parts().items()}) if BUILTIN in sources else None
    return {
        "spec": spec.model_dump(mode="json"),
        "files": files,
        "commits": commits(spec),
        "builtin": own,
        "libraries": {name: _found_version(name) for name in ("jinja2", "pillow")},  # chats and images, where installed
    }


def _found_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def surroundings(machine: Machine, seed: int) -> dict[str, Any]:
    """What the bytes of a result depend on besides its input and its options."""
    device = device_of(machine)
    return {
        "code": _code(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "device": described(device),
        "precision": precision_of(device).reason,
        "threads": machine.threads,
        "seed": seed,
    }


def folder_key(folder: Path) -> str:
    """Digest of all that a step reads of a checkpoint."""
    return key_of([(file.name, digest(file)) for file in _files(folder)])


def _files(folder: Path) -> list[Path]:
    """All that a step reads of a checkpoint: weights, config, and what is carried over."""
    weights = {place.file for place in read_header(folder).locations.values()}
    carried = {path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    return sorted({folder / "config.json", *weights, *carried})


@cache
def _code() -> str:
    root = Path(__file__).parent
    return key_of(
        [(str(path.relative_to(root)), path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))]
    )


def key_of(content: Mapping[str, Any] | Sequence[Any]) -> str:
    """Digest of JSON data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
