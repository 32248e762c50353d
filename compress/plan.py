"""Recipe + config.json + safetensors headers -> Plan: shapes, parameters, bytes, memory, disk. Torch-free.

Every mistake that headers can show is found here, before a weight is read, and all of them are told at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from compress.arch import Family, family_of
from compress.arch.tower import cut_sizes
from compress.checkpoint import per_layer
from compress.checkpoint.headers import DTYPE_BYTES, Header, read_header
from compress.checkpoint.layout import SHARD_BYTES
from compress.checkpoint.per_layer import one_or_each
from compress.checkpoint.source import Source, locate
from compress.data import BUILTIN, TOKENIZERS, DataSpec, Part, check, sources
from compress.errors import GateError, MachineError, UserError
from compress.formats import Plain, format_of
from compress.machine import Machine, Progress, Silent
from compress.needs import check_room, disk, needs, passes
from compress.recipe import Recipe
from compress.steps import STEPS
from compress.steps.sampling import Author, authors_of
from compress.steps.types import PlanContext, StepPlan

_EVALUATED = "let evaluate be 'last' or 'each', or take the gate out"


@dataclass(frozen=True)
class Plan:
    """What a recipe will do. `parameters`: of the model it starts from. `passes`: the indices of the steps that are
    done together, each leaving one folder. `memory`: the largest estimated peak of a step above interpreter and
    libraries, `disk`: bytes that must be free; None when the machine was left out."""

    recipe: Recipe
    source: Source
    teacher: Source | None
    family: Family
    before: Header
    parameters: int
    steps: tuple[StepPlan, ...]
    passes: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    memory: int | None
    disk: int | None

    @property
    def kv_cache(self) -> tuple[int, int]:
        """Bytes that keys and values take a token, before the first step and after the last."""
        return _kv_cache(self.before), _kv_cache(self.steps[-1].after)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        found: dict[str, Any] = {
            "model": self.source.name,
            "model_type": self.family.model_type,
            "parameters": self.parameters,
            "bytes": self.before.nbytes,
            "steps": [self._step(index, step) for index, step in enumerate(self.steps)],
            "notes": list(self.notes),
        }
        if self.teacher is not None:
            found["teacher"] = self.teacher.name
        if self.memory is not None:
            found |= {"memory": self.memory, "disk": self.disk}
        return found

    def _step(self, index: int, step: StepPlan) -> dict[str, Any]:
        before, after = (family_of(header).layers(header) for header in (step.before, step.after))
        found: dict[str, Any] = {
            "step": f"{index + 1}-{step.kind}",
            "options": step.options.model_dump(mode="json", exclude_none=True),
            "ffn": [one_or_each([sizes.ffn for sizes in layers]) for layers in (before, after)],
            "heads": [one_or_each([sizes.heads for sizes in layers]) for layers in (before, after)],
            "layers": [len(before), len(after)],
            **cut_sizes(family_of(step.before).tower, step.before.config, step.after.config),
            "kv_cache_bytes": [_kv_cache(step.before), _kv_cache(step.after)],
            "parameters": step.parameters,
            "bytes": step.nbytes,
            **({} if (loss := getattr(step, "predicted_loss", None)) is None else {"predicted_loss": loss}),
            "notes": list(step.notes),
        }
        return found if self.memory is None else found | {"memory": step.memory, "disk": self.disk_of(index)}

    def disk_of(self, index: int) -> int:
        """Bytes that the work folder holds at most while step `index` is done: its input, its output, its states."""
        return disk(self.steps, self.passes)[index]


def _flag(path: str) -> str:
    """What a lone command calls a key of its one-step recipe; nothing for the step itself."""
    key = path.rpartition(".")[2]
    if key in STEPS or not key:
        return ""
    words = {"model": "MODEL", "calibration": "--data", "training": "--data", "evaluation": "--data"}
    return words.get(key, "--" + key.replace("_", "-"))


class _Complaints:
    """All that is wrong, one line each."""

    def __init__(self, where: str | None) -> None:
        self.where = where
        self.lines: list[str] = []
        self.hints: list[str] = []
        self.machine: MachineError | None = None  # told only when nothing is wrong with the input

    def add(self, path: str, message: str, hint: str | None = None) -> None:
        key = path if self.where is not None else _flag(path)
        parts = [part for part in (self.where, key) if part]
        self.lines.append(": ".join([*parts, message]))
        if hint and hint not in self.hints:
            self.hints.append(hint)

    def finish(self) -> None:
        if not self.lines:
            if self.machine is not None:
                raise self.machine
            return
        text = self.lines[0] if len(self.lines) == 1 else "\n".join([f"{len(self.lines)} problems:", *self.lines])
        raise UserError(text, hint="; ".join(self.hints) or None)


def make_plan(
    recipe: Recipe,
    machine: Machine,
    *,
    check_machine: bool = True,
    progress: Progress | None = None,
    where: str | None = "recipe",
    out: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plan `recipe`. `where` names the recipe in messages; None: a lone command, whose messages name flags.

    Raises UserError with all complaints; only without any GateError for a gate that the planned size fails, and
    MachineError when memory, disk or the network are in the way: a wrong input is told first.
    """
    complaints = _Complaints(where)
    found = _checkpoint("model", recipe.model, progress, complaints)
    teacher = _teacher(recipe, found, progress, complaints)
    authors = authors_of(_data(recipe), _needed_data(recipe), found[1], teacher and teacher[1]) if found else {}
    _check_data(recipe, found[0].folder if found else None, authors, progress, complaints)
    if found is None:
        complaints.finish()  # what the steps would make of it cannot be known
        raise AssertionError("a model that was not found is a complaint")
    source, before = found
    family = family_of(before)
    context = PlanContext(_data(recipe), teacher[1] if teacher else None, machine.threads, shard_bytes)
    steps = _plan_steps(recipe, before, context, complaints)
    complaints.finish()
    _check_gates(recipe, steps[-1])
    taken = needs(recipe, family, before, steps, authors)
    if check_machine:
        for author in authors.values():
            author.check(machine)
        more = "plan --no-machine shows the rest of the plan" if where else None
        check_room(taken, machine, out, _flag if where is None else str, more)
    parameters = format_of(before).parameters(before, family)
    shown = (taken.memory, taken.disk) if check_machine else (None, None)
    notes, together = _notes(recipe), passes(recipe)
    return Plan(
        recipe, source, teacher[0] if teacher else None, family, before, parameters, steps, together, notes, *shown
    )


def _plan_steps(recipe: Recipe, before: Header, context: PlanContext, complaints: _Complaints) -> tuple[StepPlan, ...]:
    planned: list[StepPlan] = []
    for index, entry in enumerate(recipe.steps):
        if entry.kind == "distill" and context.teacher is None:
            continue  # what is wrong with the teacher has been said

        def complain(key: str, message: str, hint: str | None = None, at: str = f"steps.{index}.{entry.kind}") -> None:
            complaints.add(f"{at}.{key}" if key else at, message, hint)

        try:
            step = STEPS[entry.kind].plan(before, entry.options, context, complain)
        except (UserError, MachineError):
            if not complaints.lines and complaints.machine is None:
                raise
            break  # the step read what was refused above, such as data that are not there: that has been said
        if step is None:
            continue  # it has complained; the later steps may have complaints of their own
        planned.append(step)
        before = step.after
    return tuple(planned)


def _data(recipe: Recipe) -> Mapping[str, DataSpec]:
    return {part: getattr(recipe.data, part) for part in ("calibration", "training", "evaluation")}


def _needed_data(recipe: Recipe) -> list[str]:
    parts = {STEPS[entry.kind].data for entry in recipe.steps if entry.kind != "quantize"}
    if recipe.evaluate != "never":
        parts.add("evaluation")
    return sorted(parts)


def _check_data(
    recipe: Recipe, folder: Path | None, authors: Mapping[str, Author], progress: Progress | None, problems: _Complaints
) -> None:
    needed = _needed_data(recipe)
    for part in needed:
        try:
            images = part == "calibration"
            check(getattr(recipe.data, part), cast(Part, part), folder, progress, images=images)
            if part in authors:
                authors[part].refuse()
        except UserError as problem:
            problems.add(f"data.{part}", problem.message, problem.hint)
        except MachineError as problem:
            problems.machine = problems.machine or problem
    if folder is not None:
        _check_tokenizer("model", folder, needed, problems)
    if recipe.gates is not None and recipe.evaluate == "never":
        quality = [
            k for k in ("max_perplexity_ratio", "max_kl", "min_top1_agreement") if getattr(recipe.gates, k) is not None
        ]
        if quality:
            problems.add(f"gates.{quality[0]}", "needs an evaluation, but evaluate is 'never'", _EVALUATED)


def _check_tokenizer(key: str, folder: Path, needed: Sequence[str], complaints: _Complaints) -> None:
    if needed and not any((folder / name).is_file() for name in TOKENIZERS):
        complaints.add(key, f"{folder}: no tokenizer ({', '.join(TOKENIZERS)}), which {' and '.join(needed)} data need")


def _checkpoint(
    key: str, spec: str, progress: Progress | None, complaints: _Complaints
) -> tuple[Source, Header] | None:
    """Where a checkpoint is, and its header; None after a complaint."""
    try:
        source = locate(spec, progress=progress or Silent())
        header = read_header(source.folder)
        per_layer.check_file(source.folder, header.config)
        wrong = check_shapes(source.folder, family_of(header), header)
    except UserError as problem:
        complaints.add(key, problem.message, problem.hint)
        return None
    except MachineError as problem:
        complaints.machine = complaints.machine or problem
        return None
    for line in wrong:
        complaints.add(key, line)
    return None if wrong else (source, header)


def _teacher(
    recipe: Recipe, model: tuple[Source, Header] | None, progress: Progress | None, complaints: _Complaints
) -> tuple[Source, Header] | None:
    """What distill learns from; None when nothing does, or after a complaint."""
    if not any(entry.kind == "distill" for entry in recipe.steps):
        if recipe.teacher is not None:
            complaints.add("teacher", "no step uses it: there is no distill step")
        return None
    if recipe.teacher is None:
        return model
    found = _checkpoint("teacher", recipe.teacher, progress, complaints)
    if found is not None:
        _check_tokenizer("teacher", found[0].folder, ["training"], complaints)
    return found


def _check_gates(recipe: Recipe, last: StepPlan) -> None:
    """Refuse now what the result's size would fail in the end."""
    planned = {"max_bytes": last.nbytes, "max_parameters": last.parameters}
    failed = [
        f"gate {gate}: the plan gives {value:,}, allowed {limit:,}; nothing was run"
        for gate, value in planned.items()
        if recipe.gates is not None and (limit := getattr(recipe.gates, gate)) is not None and value > limit
    ]
    if failed:
        raise GateError("\n".join(failed))


def _notes(recipe: Recipe) -> tuple[str, ...]:
    """What holds for the whole recipe and is worth knowing before it runs."""
    notes = []
    for group in passes(recipe):
        if len(group) > 1:
            both = " and ".join(f"{index + 1}-{recipe.steps[index].kind}" for index in group)
            notes.append(f"{both} are done in one pass, because keep_intermediate is false: nothing lies between them")
    if not recipe.keep_intermediate and not notes:
        notes.append("keep_intermediate: false changes nothing: no prune step is followed by quantize")
    data, needed = _data(recipe), _needed_data(recipe)
    # the parts of builtin share no text
    judged = set(sources(data["evaluation"])) - {BUILTIN} if "evaluation" in needed else set()
    for part in needed:
        same = sorted(judged & set(sources(data[part])))
        if same and part != "evaluation":
            said = f"evaluation and {part} read the same text ({', '.join(same)})"
            notes.append(f"{said}: the result is judged on what it was made with")
    return tuple(notes)


def _kv_cache(header: Header) -> int:
    """Bytes that a checkpoint's keys and values take a token, in the dtype that it is stored in."""
    return family_of(header).sizes(header).kv_cache(DTYPE_BYTES[header.dtype])


def check_shapes(folder: Path, family: Family, header: Header) -> list[str]:
    """What contradicts config.json, as one line or none: its class, a tensor that is missing, misshapen, too many."""
    stored = format_of(header)
    found = header.tensors if isinstance(stored, Plain) else stored.logical(header)
    wrong = []
    named = header.config.get("architectures")
    layered = per_layer.is_per_layer(header.config)
    needed = f"{per_layer.PREFIX if layered else ''}{family.architecture}"
    if named != [needed]:
        wrong.append(f"config.json: architectures must be ['{needed}'], found {named!r}")
    elif layered and not family.layered:
        wrong.append(f"config.json: {per_layer.KEY}: layers of a {family.name} cannot differ")
    implied, prefix = family.shapes(header), family.inside
    for name, shape in implied.items():
        if name not in found:
            wrong.append(f"tensor '{name}' {list(shape)} is missing")
        elif found[name].shape != shape:
            wrong.append(f"tensor '{name}' is {list(found[name].shape)}, but config.json implies {list(shape)}")
    extra = [n for n in found if n.startswith(prefix) and n not in implied and not n.endswith("rotary_emb.inv_freq")]
    wrong += [f"tensor '{name}' has no place in the model that config.json describes" for name in extra]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"{folder}: {wrong[0]}{more}"] if wrong else []
