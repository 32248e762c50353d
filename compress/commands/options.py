"""The options that commands share, and `flat`, which turns option groups into Typer parameters.

A step's flags are generated from the fields of its Options model, so that flags and recipe keys cannot drift apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.markup import escape

from compress.complaints import explain
from compress.data import KINDS, DataSpec, parse_sources
from compress.device import CHOICES
from compress.errors import Interrupted, UserError, did_you_mean
from compress.machine import Machine, cores
from compress.recipe import part_default
from compress.report import Screen

_DATA: dict[str, Any] = {"rich_help_panel": "Data"}
_MACHINE: dict[str, Any] = {"rich_help_panel": "Machine"}
_OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a hub id (org/name@revision), a .gguf file, or demo:smollm2-135m.",
        show_default=False,
    ),
]
RecipeFile = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, as in steps.0.ratio=0.3; may be repeated."),
]
Target = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False, **_OUTPUT)
]

_SOURCES = f"{KINDS}. Repeat it, with shares as in a.txt=0.5, to mix."
_SEED = "Seed of all that is drawn; evaluation draws nothing."
_MEMORY = "As in 8GiB; to stay within, beside Python and its libraries (about 400 MiB). \\[default: free]"
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """Which text a lone command reads."""

    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SPEC", help=escape(_SOURCES) + " \\[default: builtin]", **_DATA),
    ] = None
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="N", help="Windows of text. \\[default: 64 to calibrate, else all]", **_DATA),
    ] = None
    length: Annotated[
        str | None, typer.Option("--length", metavar="L", help="Tokens per window. \\[default: 512]", **_DATA)
    ] = None
    seed: Annotated[str, typer.Option("--seed", metavar="S", help=_SEED, **_DATA)] = "0"

    def spec(self, part: str) -> DataSpec:
        """The data source, with the defaults that `part` (calibration, training or evaluation) has in a recipe."""
        source = parse_sources(self.data) if self.data else None
        given = {"source": source, "samples": self.samples, "length": self.length}
        given = {key: value for key, value in given.items() if value is not None}
        return from_flags(DataSpec, {**part_default(part).model_dump(), **given}, {"source": "--data"})

    def seed_number(self) -> int:
        return whole("--seed", self.seed, 0, 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class MachineFlags:
    """What this machine lends; no result depends on it, but for the thread count that the receipt records."""

    threads: Annotated[
        str | None,
        typer.Option(
            "--threads", metavar="N", help="Threads. \\[default: OMP_NUM_THREADS, else all cores]", **_MACHINE
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help=_MEMORY, **_MACHINE),
    ] = None
    device: Annotated[
        str,
        typer.Option("--device", metavar="D", help="cpu, cuda, or auto: cuda where there is one.", **_MACHINE),
    ] = "auto"

    def note(self, screen: Screen) -> None:
        """Say so when there are more threads than cores; a wrong --threads is refused by `machine`."""
        if self.threads is not None and int(self.threads) > cores():
            screen.progress.note(f"--threads {self.threads}: more than the {cores()} cores that this process may use")

    def machine(self) -> Machine:
        threads = None if self.threads is None else whole("--threads", self.threads, 1, 4096)
        if self.device not in CHOICES:
            allowed = ", ".join(CHOICES)
            raise UserError(f"--device: found '{self.device}', allowed: {allowed}{did_you_mean(self.device, CHOICES)}")
        return Machine.detect(threads, None if self.memory is None else parse_size(self.memory), self.device)


@dataclasses.dataclass(frozen=True)
class PlaceFlags:
    """How a result is put in place, and what becomes of work that was not finished."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.", **_OUTPUT)] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; take nothing from OUT.work.", **_OUTPUT)] = False
    discard: Annotated[
        bool, typer.Option("--discard", help="Keep nothing in OUT.work when the run fails.", **_OUTPUT)
    ] = False
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another run that writes OUT.", **_OUTPUT)] = False
    checkpoint_every: Annotated[
        str,
        typer.Option("--checkpoint-every", metavar="S", help="Seconds between the saved states of a step.", **_OUTPUT),
    ] = "60"

    def arguments(self) -> dict[str, Any]:
        """As keywords of what writes OUT."""
        return {
            "overwrite": self.overwrite,
            "fresh": self.fresh,
            "discard": self.discard,
            "wait": self.wait,
            "checkpoint_every": float(whole("--checkpoint-every", self.checkpoint_every, 0, 10**6)),
        }


@dataclasses.dataclass(frozen=True)
class RunFlags(PlaceFlags):
    """The same of a run with steps."""

    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep the steps' folders in OUT.work.", **_OUTPUT)] = (
        False
    )
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Largest safetensors file, as in 2GB.", **_OUTPUT)
    ] = "5GB"
    stop_after: Annotated[
        str | None, typer.Option("--stop-after", metavar="N", help="End after N steps; keep OUT.work.", **_OUTPUT)
    ] = None

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, as plan does; write nothing.", **_OUTPUT)
    ] = False

    def arguments(self) -> dict[str, Any]:
        """As keywords of `compress.run.run`."""
        return super().arguments() | {
            "keep_work": self.keep_work,
            "stop_after": None if self.stop_after is None else whole("--stop-after", self.stop_after, 1, 999),
            "shard_bytes": parse_size(self.shard_size, "--shard-size"),
        }


@contextlib.contextmanager
def told_what_is_kept() -> Iterator[None]:
    """Interrupted in the place of a KeyboardInterrupt that says what a later run can take over: Typer would lose it."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if not str(stopped):
            raise
        raise Interrupted(str(stopped)) from None


@dataclasses.dataclass(frozen=True)
class ScreenFlags:
    """How much is said, and in which form."""

    json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, errors too.", **_OUTPUT)] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.", **_OUTPUT)] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every note; tracebacks of bugs.", **_OUTPUT)] = False

    def screen(self) -> Screen:
        if self.quiet and self.verbose:
            raise UserError("-q and -v exclude each other")
        return Screen(json=self.json, quiet=self.quiet, verbose=self.verbose)


def parse_size(text: str, flag: str = "--memory") -> int:
    """Bytes of `8GiB`, `500MB`, `1.5G` (powers of 1024 with an i or without a B, of 1000 as in MB)."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"{flag}: found '{text}', allowed: a size such as 8GiB or 500MB")
    number, unit, binary = found.groups()
    base = 1000 if text.strip().lower().endswith("b") and not binary else 1024
    size = int(float(number) * base ** " kmgt".index(unit.lower() or " "))
    if size <= 0:
        raise UserError(f"{flag}: found '{text}', allowed: a size above 0")
    return size


def whole(name: str, text: str, least: int, most: int) -> int:
    """A whole number within bounds, both included."""
    if not re.fullmatch(r"[0-9]{1,12}", text.strip()) or not least <= int(text) <= most:
        raise UserError(f"{name}: found '{text}', allowed: a whole number from {least} to {most}")
    return int(text)


def flag(field: str) -> str:
    """`keep_ffn` -> `--keep-ffn`."""
    return "--" + field.replace("_", "-")


M = typing.TypeVar("M", bound=BaseModel)


def from_flags(model: type[M], given: Mapping[str, Any], names: Mapping[str, str] | None = None) -> M:
    """`model` of the flags' values, where numbers may still be text; a UserError names the flags at fault.

    `names`: flags that are not named as their field is.
    """
    values = {key: _number(model.model_fields[key], value) for key, value in given.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        wrong = []
        for problem in error.errors(include_url=False):
            text, loc = explain(problem, model), problem["loc"]
            key = str(loc[0]) if loc else ""
            wrong.append(f"{(names or {}).get(key, flag(key))}: {text}" if key else text)
        raise UserError("; ".join(wrong)) from None


def _number(field: FieldInfo, value: Any) -> Any:
    """Text as the number that `field` wants; as it is when it is none, for the model to refuse."""
    kinds = _kinds(field.annotation)
    if not isinstance(value, str) or str in kinds:
        return value
    with contextlib.suppress(ValueError):
        if int in kinds and len(value) < 20:  # what has more digits is refused as text: it would overflow later
            return int(value)
        if float in kinds and math.isfinite(float(value)):
            return float(value)
    return value


_CONTEXT = "context"


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as Typer sees it: every parameter that is an option group (a pydantic model or one of the dataclasses
    above) becomes one flag a field; when called, the groups are put together again, checked by their model, which is
    given the flags that were given alone."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, tuple[str, ...]]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        fields = _fields(hints[name])
        if fields is None:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            parameters += fields
            groups[name] = (hints[name], tuple(field.name for field in fields))

    parameters.append(inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))

    @functools.wraps(function)
    def call(**given: Any) -> None:
        context = given.pop(_CONTEXT)
        for name, (group, fields) in groups.items():
            values = {field: given.pop(field) for field in fields}
            if issubclass(group, BaseModel):
                told = [field for field in fields if context.get_parameter_source(field).name != "DEFAULT"]
                given[name] = from_flags(group, {field: _joined(values[field]) for field in told})
            else:
                given[name] = group(**values)
        function(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _fields(group: Any) -> list[inspect.Parameter] | None:
    if isinstance(group, type) and issubclass(group, BaseModel):
        panel = group.__name__.removesuffix("Options")
        return [_from_pydantic(name, field, panel) for name, field in group.model_fields.items()]
    if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
        return None
    hints = typing.get_type_hints(group, include_extras=True)
    return [_parameter(field.name, hints[field.name], field.default) for field in dataclasses.fields(group)]


def _from_pydantic(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    """One Typer option of a model's field. Numbers come as text: the model says what is wrong with one."""
    kinds = _kinds(field.annotation)
    default = None if field.is_required() else field.get_default()
    names, metavar = flag(name), None
    kind: Any = str
    if bool in kinds:
        names, kind = f"{names}/--no-{name.replace('_', '-')}", bool
    elif kinds & {int, float}:
        metavar = "N" if int in kinds else "X"
    shown = default is not None
    text = escape(field.description or "")  # a description is no markup
    if any(typing.get_origin(each) in (list, tuple, dict) for each in kinds):
        kind, text = list[str], f"{text} May be repeated."
    option = typer.Option(names, metavar=metavar, help=text, rich_help_panel=panel, show_default=shown)
    if field.is_required():
        return _parameter(name, Annotated[kind, option], inspect.Parameter.empty)
    return _parameter(
        name, Annotated[kind | None, option], default if default is None or kind is bool else str(default)
    )


def _joined(value: Any) -> Any:
    """One text of what a repeated flag was given."""
    return ",".join(value) if isinstance(value, (list, tuple)) else value


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a field takes: `Annotated[float, gt=0] | None` -> {float, NoneType}."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    if origin is Literal:
        return {str}
    return {annotation}
