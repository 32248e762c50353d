"""The public functions of `import compress`, one a command: the same code as the command line, the same bytes.

Nothing is printed, and what is global in the caller's process (threads, random state, log levels) is left as it was.
Paths are str or Path; a model is a folder, a hub id, a .gguf file or demo:NAME; a step's options are keywords, named
as in recipes. Errors are those of `compress.errors`: UserError, MachineError, SelfCheckError, GateError.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast, get_type_hints

from pydantic import ValidationError

from compress.data import DataSpec
from compress.errors import UserError
from compress.machine import Machine, Progress
from compress.recipe import Recipe, explain, find, load, part_default
from compress.steps import STEPS

if TYPE_CHECKING:
    from compress.plan import Plan
    from compress.run import Result

Data = DataSpec | Mapping[str, Any] | str | Path
F = TypeVar("F", bound=Callable[..., Any])


class InspectedGroup(TypedDict):
    """Units that can be cut. `step`: units go in multiples of it; `refitted`: the module whose inputs they are."""

    group: str
    units_per_layer: int
    step: int
    parameters_per_unit: int
    refitted: str


class Inspection(TypedDict):
    """What `inspect` finds. `bytes`: of the tensors as stored; `decoder_parameters`: those of the decoder layers."""

    model: str
    model_type: str
    architecture: str | None
    format: str
    dtype: str
    parameters: int
    decoder_parameters: int
    bytes: int
    tensors: int
    files: int
    sizes: dict[str, int]
    groups: list[InspectedGroup]


class _Alone(TypedDict):
    perplexity: float
    tokens: int
    parameters: int
    bytes: int


class Evaluation(_Alone, total=False):
    """What `evaluate` measures over `tokens` predicted positions; with a reference the distance from it.

    `perplexity_ratio`: perplexity over the reference's. `kl`: mean KL(reference || model), nats a token.
    `top1_agreement`: share of positions where both models' likeliest next token is the same.
    """

    reference_perplexity: float
    perplexity_ratio: float
    kl: float
    top1_agreement: float


def _with_options(kind: str) -> Callable[[F], F]:
    """Give a step's function the signature and help of the step's options, which are declared in one place only."""

    def dress(function: F) -> F:
        fields, types = STEPS[kind].options.model_fields, get_type_hints(STEPS[kind].options)
        shown = signature(function)
        explicit = [p for p in shown.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        known = {p.name for p in explicit}
        keywords = [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.is_required() else field.default,
                annotation=types[name],
            )
            for name, field in fields.items()
            if name not in known
        ]
        function.__signature__ = shown.replace(parameters=[*explicit, *keywords])  # type: ignore[attr-defined]
        lines = [f"    {name}: {field.description}" for name, field in fields.items()]
        function.__doc__ = "\n".join([cleandoc(function.__doc__ or ""), "", "Options of the step:", *lines])
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


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    machine: Machine | None = None,
    overwrite: bool = False,
    keep_work: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Carry out a recipe into the folder `out`, which appears whole or not at all.

    `recipe` and `overrides` as in `plan`. `machine`: threads and memory, all there are by default; `overwrite`
    replaces an earlier result; `keep_work` keeps the steps' folders in OUT.work. Raises UserError (nothing written),
    MachineError, SelfCheckError, and GateError: the result then lies in OUT.rejected and is the error's `result`.
    """
    read, where = _recipe(recipe, overrides)
    return _carry_out(read, where, out, machine, overwrite, keep_work, progress)


@_with_options("prune")
def prune(
    model: str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    overwrite: bool = False,
    keep_work: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Remove query heads and FFN neurons into a new checkpoint `out`, and refit what reads them.

    `data` is the calibration text, 64 windows of 512 tokens by default: a source ("builtin", a .txt or .jsonl file)
    or a mapping with the keys source, samples, length. The other keywords, and the errors, are those of `run`.
    """
    return _lone("prune", model, out, options, None, data, seed, machine, overwrite, keep_work, progress)


@_with_options("distill")
def distill(
    model: str | Path,
    out: str | Path,
    *,
    teacher: str | Path,
    data: Data | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    overwrite: bool = False,
    keep_work: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Train a model towards its teacher's next-token distribution, into a new checkpoint `out`.

    `data` is the training text, all of it in windows of 512 tokens by default; as in `prune`. The other keywords, and
    the errors, are those of `run`.
    """
    return _lone("distill", model, out, options, teacher, data, seed, machine, overwrite, keep_work, progress)


@_with_options("quantize")
def quantize(
    model: str | Path,
    out: str | Path,
    *,
    format: str,
    data: Data | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    overwrite: bool = False,
    keep_work: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Write a checkpoint in a smaller number format, tensor by tensor.

    `data` and `seed` are recorded as the command line records them; the formats of today read no text. The other
    keywords, and the errors, are those of `run`.
    """
    given = {"format": format, **options}
    return _lone("quantize", model, out, given, None, data, seed, machine, overwrite, keep_work, progress)


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
    a model or the text cannot be read, when config.json contradicts the tensors, or when the
    reference has another vocabulary; MachineError when the hidden states of all windows do not fit in memory.
    """
    from compress.arch import family_of
    from compress.checkpoint.headers import read_header
    from compress.checkpoint.source import locate
    from compress.plan import check_shapes

    spec = _data(data, "evaluation")
    other = None if reference is None else locate(str(reference)).folder
    folder = locate(str(model)).folder
    for each in dict.fromkeys([folder] if other is None else [folder, other]):
        header = read_header(each)
        if lines := check_shapes(each, family_of(header), header):
            raise UserError("\n".join(lines))
    with _left_as_it_was():
        from compress.steps.evaluate.run import evaluate as measure

        found = measure(folder, spec, machine or Machine.detect(), reference=other, seed=seed, progress=progress)
    return cast(Evaluation, found)


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
    given = {} if data is None else {"source": data} if isinstance(data, (str, Path)) else dict(data)
    if isinstance(given.get("source"), Path):
        given["source"] = str(given["source"])
    try:
        return DataSpec.model_validate({**part_default(part).model_dump(), **given})
    except ValidationError as error:
        raise _wrong(error, DataSpec, "data") from None


def _lone(
    kind: str,
    model: str | Path,
    out: str | Path,
    given: Mapping[str, Any],
    teacher: str | Path | None,
    data: Data | None,
    seed: int,
    machine: Machine | None,
    overwrite: bool,
    keep_work: bool,
    progress: Progress | None,
) -> Result:
    """Run the recipe whose only step is `kind`."""
    step = STEPS[kind]
    try:
        options = step.options.model_validate(given)
    except ValidationError as error:
        raise _wrong(error, step.options, kind) from None
    spec, master = _data(data, step.data), None if teacher is None else str(teacher)
    try:
        recipe = Recipe.single(kind, str(model), options, teacher=master, data=spec, seed=seed)
    except ValidationError as error:
        raise _wrong(error, Recipe, kind) from None
    return _carry_out(recipe, "", out, machine, overwrite, keep_work, progress)


def _carry_out(
    recipe: Recipe,
    where: str,
    out: str | Path,
    machine: Machine | None,
    overwrite: bool,
    keep_work: bool,
    progress: Progress | None,
) -> Result:
    with _left_as_it_was():
        from compress.run import run as carry_out

        target, limits = Path(out).expanduser(), machine or Machine.detect()
        return carry_out(
            recipe, target, limits, overwrite=overwrite, keep_work=keep_work, progress=progress, where=where
        )


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Give a caller's process back its torch threads, random states and log levels, which a run sets for itself."""
    import numpy as np
    import torch
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


def _wrong(error: ValidationError, model: type[Any], what: str) -> UserError:
    problems = [(".".join(map(str, e["loc"][:1])), explain(e, model)) for e in error.errors(include_url=False)]
    return UserError(f"{what}: " + "; ".join(f"{key}: {text}" if key else text for key, text in problems))
