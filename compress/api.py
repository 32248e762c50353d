"""The public functions of `import compress`, one a command: the same code as the command line, the same bytes.

Nothing is printed, and what is global in the caller's process (threads, random state, log levels) is left as it was.
Paths are str or Path; a model is a folder, a hub id, a .gguf file or demo:NAME; a step's options are keywords, named
as in recipes. Errors are those of `compress.errors`: UserError, MachineError, SelfCheckError, GateError.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast, get_type_hints

from pydantic import ValidationError

from compress.complaints import in_one_line
from compress.data import DataSpec
from compress.errors import UserError, did_you_mean
from compress.machine import Machine, Progress, Silent
from compress.recipe import Recipe, find, load, part_default
from compress.signatures import (
    DEFAULTS,
    STEP_KEYWORDS,
    DistillKeywords,
    Evaluation,
    Inspection,
    PruneKeywords,
    QuantizeKeywords,
    Receipt,
    RunKeywords,
    SensitivityKeywords,
    StepKeywords,
)
from compress.steps import STEPS

if TYPE_CHECKING:
    from compress.plan import Plan
    from compress.run import Result
    from compress.sensitivity import Sensitivity

Data = DataSpec | Mapping[str, Any] | str | Path
F = TypeVar("F", bound=Callable[..., Any])


def _shown(kind: str | None = None) -> Callable[[F], F]:
    """Give a function that takes `**keywords` the signature that `help` shows: every keyword with its default, and the
    options of the step `kind`, which are declared in one place only."""

    def dress(function: F) -> F:
        fields = STEPS[kind].options.model_fields if kind else {}
        types = get_type_hints(STEP_KEYWORDS[kind] if kind else RunKeywords)
        defaults = {name: Parameter.empty if f.is_required() else f.get_default() for name, f in fields.items()}
        defaults |= {name: DEFAULTS[name] for name in types if name not in fields}
        keywords = [Parameter(n, Parameter.KEYWORD_ONLY, default=d, annotation=types[n]) for n, d in defaults.items()]
        shown = signature(function)
        explicit = [p for p in shown.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        function.__signature__ = shown.replace(parameters=[*explicit, *keywords])  # type: ignore[attr-defined]
        options = [f"    {name}: {field.description}" for name, field in fields.items()]
        heading = ["", "Options of the step:"] if options else []
        function.__doc__ = "\n".join([cleandoc(function.__doc__ or ""), *heading, *options])
        return function

    return dress


def inspect(model: str | Path) -> Inspection:
    """Sizes, parameters, bytes and prunable groups of a model, from headers alone.

    Raises UserError when the model is not found or its headers cannot be read.
    """
    from compress.inspect import inspect_model

    return cast(Inspection, inspect_model(str(model)))


def plan(recipe: Recipe | str | Path, overrides: Sequence[str] = (), *, machine: Machine | None = None) -> Plan:
    """The plan of a recipe, from headers alone: shapes, parameters, bytes and notes of every step.

    `recipe` is a file, a shipped recipe's name or a Recipe; `overrides` are as in `--set`: "steps.0.ratio=0.3".
    Without `machine`, memory and disk are left out. Raises UserError with everything that is wrong, MachineError when
    memory or disk are too small.
    """
    from compress.plan import make_plan

    read, where = _recipe(recipe, overrides)
    return make_plan(read, machine or Machine.detect(), check_machine=machine is not None, where=where)


@_shown()
def run(
    recipe: Recipe | str | Path, out: str | Path, overrides: Sequence[str] = (), **keywords: Unpack[RunKeywords]
) -> Result:
    """Carry out a recipe into the folder `out`, which appears whole or not at all.

    `recipe` and `overrides` as in `plan`. `machine`: threads, memory, device, all there are by default; `overwrite`
    replaces an earlier result; `keep_work` keeps the steps' folders in OUT.work. Work that an earlier run left there is
    taken over, unless `fresh`; what fails leaves it, unless `discard`; `wait` for another run that writes `out`.
    `stop_after` so many steps it ends: the Result's `out` is then the last step's folder, its receipt empty.

    Raises UserError (nothing written), MachineError, SelfCheckError, and GateError: the result then lies in
    OUT.rejected, from where a run with other gates takes it, and is the error's `result`.
    """
    _check_names("run", keywords, get_type_hints(RunKeywords))
    read, where = _recipe(recipe, overrides)
    return _carry_out(read, where, out, keywords)


@_shown("prune")
def prune(model: str | Path, out: str | Path, *, data: Data | None = None, **keywords: Unpack[PruneKeywords]) -> Result:
    """Remove query heads, FFN neurons and decoder layers into a new checkpoint `out`, and refit what reads them.

    `data` is the calibration text, 64 windows of 512 tokens by default: a source (a file, a folder, "builtin", "self",
    "hub:NAME:SPLIT") or a mapping with the keys source, samples, length. Keywords that are no option, and the errors,
    are those of `run`.
    """
    return _lone("prune", model, out, keywords, data=data)


@_shown("distill")
def distill(
    model: str | Path,
    out: str | Path,
    *,
    teacher: str | Path,
    data: Data | None = None,
    **keywords: Unpack[DistillKeywords],
) -> Result:
    """Train a model towards its teacher's next-token distribution, into a new checkpoint `out`.

    `data` is the training text, all of it in windows of 512 tokens by default; as in `prune`. Keywords that are no
    option, and the errors, are those of `run`.
    """
    return _lone("distill", model, out, keywords, teacher=teacher, data=data)


@_shown("quantize")
def quantize(model: str | Path, out: str | Path, **keywords: Unpack[QuantizeKeywords]) -> Result:
    """Write a checkpoint in a smaller number format, tensor by tensor.

    `seed` is recorded; the formats of today draw nothing and read no text. Keywords that are no option, and the errors,
    are those of `run`.
    """
    return _lone("quantize", model, out, keywords)


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    data: Data | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model, streamed layer by layer, and with a reference the distance from it.

    `data` is the evaluation text, all of it in windows of 512 tokens by default; as in `prune`. Raises UserError when
    a model or the text cannot be read, when stock transformers would not take every tensor (a vision tower's too), or
    when the reference has another vocabulary; MachineError when the hidden states of all windows do not fit in memory.
    """
    from compress.checkpoint.source import locate

    spec, told = _data(data, "evaluation"), progress or Silent()
    other = None if reference is None else locate(str(reference), progress=told).folder
    folder = locate(str(model), progress=told).folder
    _check_shapes(folder, *([] if other is None else [other]))
    with _left_as_it_was():
        from compress.check import check_source
        from compress.steps.evaluate.run import evaluate as measure

        for one in dict.fromkeys([folder, *([] if other is None else [other])]):
            check_source(one)
        found = measure(folder, spec, machine or Machine.detect(), reference=other, seed=seed, progress=progress)
    return cast(Evaluation, found)


def measure_sensitivity(
    model: str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    seed: int = 0,
    overwrite: bool = False,
    fresh: bool = False,
    discard: bool = False,
    wait: bool = False,
    checkpoint_every: float = 60.0,
    machine: Machine | None = None,
    progress: Progress | None = None,
    **options: Unpack[SensitivityKeywords],
) -> Sensitivity:
    """Measure what every head, KV group and neuron of a model costs and what cuts will do to its loss, into the folder
    `out`; returns what `load_sensitivity(out)` reads.

    `data` is the calibration text, as in `prune`. Options: criterion, damping, gradient_samples (windows of the
    backward pass), pictures. The other keywords are those of `run`: an interrupted analysis goes on where it stood.
    Raises UserError for wrong input, MachineError where memory or disk are too small.
    """
    from compress.steps.prune.measuring import SensitivityOptions

    _check_names("measure_sensitivity", options, SensitivityOptions.model_fields)
    try:
        chosen = SensitivityOptions.model_validate(options)
    except ValidationError as error:
        raise in_one_line(error, SensitivityOptions, "measure_sensitivity") from None
    with _left_as_it_was():
        from compress.analysis import measure_sensitivity as measure

        place, limits = Path(out).expanduser(), machine or Machine.detect()
        spec = _data(data, "calibration")
        return measure(
            str(model),
            place,
            spec,
            chosen,
            limits,
            seed=seed,
            overwrite=overwrite,
            fresh=fresh,
            discard=discard,
            wait=wait,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )


def load_receipt(folder: str | Path) -> Receipt:
    """receipt.json of a result. Raises UserError where there is none, or one of another format."""
    from compress import receipt

    return cast(Receipt, receipt.load_receipt(folder))


def _check_shapes(*folders: Path) -> None:
    """Refuse checkpoints whose tensors are not those that their config.json implies: one line for each complaint."""
    from compress.arch import family_of
    from compress.checkpoint.headers import read_header
    from compress.plan import check_shapes

    lines: list[str] = []
    for folder in dict.fromkeys(folders):
        header = read_header(folder)
        lines += check_shapes(folder, family_of(header), header)
    if lines:
        raise UserError(lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems:", *lines]))


def _recipe(recipe: Recipe | str | Path, overrides: Sequence[str]) -> tuple[Recipe, str]:
    if not isinstance(recipe, Recipe):
        file = find(recipe)
        return load(file, overrides), str(file)
    if overrides:
        raise UserError("overrides are for recipe files; change a Recipe with model_copy(update={...})")
    return recipe, "recipe"


def _data(data: Data | None, part: str) -> DataSpec:
    if isinstance(data, DataSpec):
        return data
    if data is not None and not isinstance(data, (str, Path, Mapping)):
        raise UserError(f"data: found {data!r}, allowed: a source, or a mapping with source, samples and length")
    given = {} if data is None else {"source": data} if isinstance(data, (str, Path)) else dict(data)
    if isinstance(given.get("source"), Path):
        given["source"] = str(given["source"])
    try:
        return DataSpec.model_validate({**part_default(part).model_dump(), **given})
    except ValidationError as error:
        raise in_one_line(error, DataSpec, "data") from None


def _lone(
    kind: str,
    model: str | Path,
    out: str | Path,
    keywords: Mapping[str, Any],
    *,
    teacher: str | Path | None = None,
    data: Data | None = None,
) -> Result:
    """Run the recipe whose only step is `kind`. `keywords`: the step's options and those of StepKeywords."""
    step = STEPS[kind]
    _check_names(kind, keywords, [*step.options.model_fields, *get_type_hints(StepKeywords)])
    shared = {name: value for name, value in keywords.items() if name not in step.options.model_fields}
    try:
        options = step.options.model_validate({name: keywords[name] for name in keywords if name not in shared})
    except ValidationError as error:
        raise in_one_line(error, step.options, kind) from None
    recipe = Recipe.single(
        kind,
        str(model),
        options,
        teacher=None if teacher is None else str(teacher),
        data=_data(data, step.data),
        seed=shared.pop("seed", 0),
    )
    return _carry_out(recipe, "", out, shared)


def _check_names(function: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{function}: {name}: unknown key{did_you_mean(name, known)}")


def _carry_out(recipe: Recipe, where: str, out: str | Path, keywords: Mapping[str, Any]) -> Result:
    given = dict(keywords)
    machine = given.pop("machine", None) or Machine.detect()
    with _left_as_it_was():
        from compress.run import run as carry_out

        return carry_out(recipe, Path(out).expanduser(), machine, where=where, **given)


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Give a caller's process back its torch threads, random states and log levels, which a run sets for itself."""
    import numpy as np
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401  in a notebook it warns that there are no widgets; nothing here draws any
    from transformers.utils import logging as hf

    hf_logging: Any = hf
    threads, states = torch.get_num_threads(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    kernels = logging.getLogger("bitsandbytes")  # warns of 4-bit kernels that nothing here uses
    level = kernels.level
    kernels.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        kernels.setLevel(level)
