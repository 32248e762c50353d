"""The public functions of `import compress`, one a command: the same code as the command line, for Python.

A recipe is a `Recipe`, a file, or a shipped recipe's name; a step's options are keywords, named as in recipes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress.data import DataSpec
from compress.errors import UserError
from compress.machine import Machine, Progress
from compress.recipe import Recipe, explain, find, load, part_default
from compress.steps import STEPS

if TYPE_CHECKING:
    from compress.plan import Plan
    from compress.run import Result

Data = DataSpec | Mapping[str, Any] | str


def inspect(model: str | Path) -> dict[str, Any]:
    """Sizes, parameters, bytes and prunable groups of a model, from headers alone."""
    from compress.inspect import inspect_model

    return inspect_model(str(model))


def plan(recipe: Recipe | str | Path, overrides: Sequence[str] = (), *, machine: Machine | None = None) -> Plan:
    """The plan of a recipe, from headers alone. Without `machine`, memory and disk are left out.

    Raises UserError with everything that is wrong, MachineError when memory or disk are too small.
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
    """Carry out a recipe into the folder `out`.

    Raises UserError (nothing written), MachineError, SelfCheckError, and GateError (the result is in OUT.rejected).
    """
    from compress.run import run as carry_out

    read, where = _recipe(recipe, overrides)
    limits = machine or Machine.detect()
    return carry_out(read, Path(out), limits, overwrite=overwrite, keep_work=keep_work, progress=progress, where=where)


def prune(model: str | Path, out: str | Path, **keywords: Any) -> Result:
    """Remove query heads and FFN neurons: `ratio`, `ffn`, `heads`, `keep_ffn`, `keep_heads`, `criterion` ...

    Besides: `data` (calibration), `seed`, and the keywords of `run`.
    """
    return _lone("prune", model, out, keywords)


def distill(model: str | Path, out: str | Path, *, teacher: str | Path, **keywords: Any) -> Result:
    """Train a model towards its teacher: `epochs`, `max_steps`, `learning_rate` ...; `data` (training), `seed`, and
    the keywords of `run`."""
    return _lone("distill", model, out, keywords, teacher=str(teacher))


def quantize(model: str | Path, out: str | Path, *, format: str, **keywords: Any) -> Result:
    """Write a checkpoint in a smaller number format; besides, the keywords of `run`."""
    return _lone("quantize", model, out, {"format": format, **keywords})


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    data: Data | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """perplexity, tokens, parameters, bytes; with a reference reference_perplexity, perplexity_ratio, kl (nats per
    token), top1_agreement."""
    from compress.checkpoint.source import locate
    from compress.steps.evaluate.run import evaluate as measure

    other = None if reference is None else locate(str(reference)).folder
    spec = _data(data, "evaluation")
    folder = locate(str(model)).folder
    return measure(folder, spec, machine or Machine.detect(), reference=other, seed=seed, progress=progress)


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
    given = {} if data is None else {"source": data} if isinstance(data, str) else dict(data)
    try:
        return DataSpec.model_validate({**part_default(part).model_dump(), **given})
    except ValidationError as error:
        raise _wrong(error, DataSpec, "data") from None


def _lone(
    kind: str, model: str | Path, out: str | Path, keywords: Mapping[str, Any], teacher: str | None = None
) -> Result:
    step = STEPS[kind]
    ours = {key: keywords[key] for key in ("machine", "overwrite", "keep_work", "progress") if key in keywords}
    given = {key: value for key, value in keywords.items() if key not in (*ours, "data", "seed")}
    try:
        options = step.options.model_validate(given)
    except ValidationError as error:
        raise _wrong(error, step.options, kind) from None
    spec = _data(keywords.get("data"), step.data)
    try:
        recipe = Recipe.single(kind, str(model), options, teacher=teacher, data=spec, seed=keywords.get("seed", 0))
    except ValidationError as error:
        raise _wrong(error, Recipe, kind) from None
    return run(recipe, out, **ours)


def _wrong(error: ValidationError, model: type[Any], what: str) -> UserError:
    problems = [(".".join(map(str, e["loc"][:1])), explain(e, model)) for e in error.errors(include_url=False)]
    return UserError(f"{what}: " + "; ".join(f"{key}: {text}" if key else text for key, text in problems))
