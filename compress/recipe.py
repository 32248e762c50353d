"""What a user wants done, as a frozen `Recipe`: read from YAML strictly, written back canonically. Torch-free.

`load` reports every problem of a file at once, with file, line, path and the nearest allowed name; `dump` writes the
shortest YAML that loads to an equal recipe. A step's keys are the fields of its Options model, the same as its flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from compress.complaints import explain, in_one_line
from compress.data import DataSpec
from compress.errors import UserError, did_you_mean, nearest
from compress.numbers import COUNTS, SIZES, number_or
from compress.recipe_yaml import CONTROL, Entry, Problems, dump_yaml, override, parse, read_text, show
from compress.steps import STEPS
from compress.steps.types import StepOptions

M = TypeVar("M", bound=BaseModel)
VERSION = 1  # of the recipe format: a recipe that says a higher one is refused before its keys are looked at


def _one_line(found: str) -> str:
    if control := CONTROL.search(found):
        raise ValueError(f"found {show(found)}, which holds the control character {control[0]!r}")
    return found


Name = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]  # of a model


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataParts(_Part):
    """Where tokens come from. A plain string is short for `{source: ...}`; relative paths are relative to the current
    directory, not to the recipe file. Keys that a source leaves out keep the part's defaults."""

    calibration: DataSpec = Field(DataSpec(source="builtin", samples=64), description="Statistics of prune.")
    training: DataSpec = Field(DataSpec(source="builtin"), description="What distill trains on.")
    evaluation: DataSpec = Field(DataSpec(source="builtin"), description="What perplexity, KL, agreement are taken on.")


class Gates(_Part):
    """What the result must keep; one that fails ends the run with exit code 3. At least one is set."""

    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(None, description="Ratio to the source.")
    max_kl: Annotated[float, Field(gt=0)] | None = Field(None, description="Mean KL from the source, nats a token.")
    min_top1_agreement: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Share of equal top-1.")
    max_bytes: Annotated[int | None, *number_or(SIZES, "17.9GB or 11GiB")] = Field(
        None, description="Bytes of the result's weight files, as in 17.9GB; the plan is checked already."
    )
    max_parameters: Annotated[int | None, *number_or(COUNTS, "9B or 900M")] = Field(
        None, description="Parameters of the result, as in 9B; the plan is checked already."
    )

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if all(value is None for value in self.__dict__.values()):
            raise ValueError(f"no gate is set, allowed: {', '.join(type(self).model_fields)}")
        return self


class StepEntry(_Part):
    """One step: its name in the table of steps, and that step's options."""

    kind: str
    options: SerializeAsAny[StepOptions]

    @model_validator(mode="after")
    def _options_of_its_kind(self) -> Self:
        if self.kind not in STEPS:
            raise ValueError(f"unknown step '{self.kind}'{did_you_mean(self.kind, STEPS)}")
        if type(self.options) is not STEPS[self.kind].options:
            raise ValueError(f"{self.kind} takes {STEPS[self.kind].options.__name__}")
        return self


class Recipe(_Part):
    """A model, the steps it goes through, and what the result must keep."""

    version: Annotated[int, Field(ge=1, le=VERSION)] = Field(
        VERSION, description="Of the recipe format; a recipe of a newer one is refused."
    )
    model: Name = Field(..., description="A folder, a hub id (org/name@revision), a .gguf file, or demo:NAME.")
    teacher: Name | None = Field(None, description="The model that distill learns from; default: model.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of everything that is drawn.")
    data: DataParts = Field(DataParts(), description="Calibration, training and evaluation text.")
    steps: Annotated[tuple[StepEntry, ...], Field(min_length=1)] = Field(..., description="What is done, in order.")
    evaluate: Literal["each", "last", "never"] = Field("last", description="After which steps the result is measured.")
    keep_intermediate: bool = Field(
        True,
        description="Write every step's checkpoint; false fuses prune with the quantize step that follows it into one "
        "pass.",
    )
    gates: Gates | None = Field(None, description="What the result must keep.")

    @classmethod
    def single(
        cls,
        kind: str,
        model: str,
        options: StepOptions,
        *,
        teacher: str | None = None,
        data: DataSpec | None = None,
        seed: int = 0,
    ) -> Recipe:
        """The recipe of a lone command: one step, not evaluated. `data` stands for the source that the step reads.

        Raises UserError for a model, teacher or seed that no recipe takes."""
        parts = DataParts() if data is None else DataParts(**{STEPS[kind].data: data})
        step = StepEntry(kind=kind, options=options)
        try:
            return cls(model=model, teacher=teacher, seed=seed, data=parts, steps=(step,), evaluate="never")
        except ValidationError as error:
            raise in_one_line(error, cls, kind) from None


def part_default(part: str) -> DataSpec:
    """The data source a recipe has when it names none for `part`."""
    spec: DataSpec = getattr(DataParts(), part)
    return spec


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, with `KEY=VALUE` overrides applied.

    Raises one UserError with every problem: one line each, `file:line: path.to.key: what was found, what is allowed`.
    """
    path = find(path_or_name)
    return loads(read_text(path), str(path), overrides)


def loads(text: str, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; `source` names it in errors."""
    problems = Problems(source)
    tree = parse(text, source, problems)
    recipe = None
    if tree is not None:
        override(tree, overrides, STEPS, problems)
        _refuse_newer(tree)
        recipe = _recipe(tree, problems)
    problems.raise_any()
    if recipe is None:
        raise AssertionError("a recipe that could not be built has at least one problem")
    return recipe


def find(path_or_name: str | Path) -> Path:
    """The file that is meant: a path, else the name of a recipe in ./recipes or of one that is shipped."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    known = recipes()
    if path.is_dir() and (inner := path / "recipe.yaml").is_file():
        raise UserError(f"{path}: a folder, not a recipe; did you mean {inner}?")
    if str(path).startswith("demo:") or (path / "config.json").is_file():
        raise UserError(
            f"{path}: a model, not a recipe",
            hint="prune, distill and quantize take a model; their --dry-run plans the step",
        )
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a recipe")
    if str(path) in known:
        return known[str(path)]
    near = nearest(path.stem, known)
    known_names = ", ".join(known) or "none"
    raise UserError(
        f"{path}: no such recipe" + (f"; did you mean {known[near]}?" if near else f"; known recipes: {known_names}")
    )


def recipes() -> dict[str, Path]:
    """Recipes by name: those shipped with the package, and over them those in ./recipes."""
    folders = (Path(__file__).parent / "_recipes", Path("recipes"))
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def dump(recipe: Recipe) -> str:
    """Canonical YAML: stable order, nothing that equals its default, and `loads(dump(r)) == r`."""
    shown: dict[str, Any] = {"model": recipe.model}
    if recipe.teacher is not None:
        shown["teacher"] = recipe.teacher
    if recipe.seed:
        shown["seed"] = recipe.seed
    data = {
        part: changed
        for part in DataParts.model_fields
        if (changed := _changes(getattr(recipe.data, part), part_default(part).model_dump()))
    }
    if data:
        shown["data"] = data
    shown["steps"] = [{step.kind: _changes(step.options)} for step in recipe.steps]
    if recipe.evaluate != "last":
        shown["evaluate"] = recipe.evaluate
    if not recipe.keep_intermediate:
        shown["keep_intermediate"] = False
    if recipe.gates is not None:
        shown["gates"] = _changes(recipe.gates)
    return dump_yaml(shown)


def _changes(model: BaseModel, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    fields = type(model).model_fields
    base = {key: field.get_default() for key, field in fields.items()} if defaults is None else defaults
    return {key: value for key, value in model.model_dump().items() if fields[key].is_required() or value != base[key]}


def _checked(
    model: type[M], given: Mapping[str, Any], path: tuple[str | int, ...], tree: Entry, problems: Problems
) -> M | None:
    """`model` of `given`, or None after reporting every field at fault."""
    try:
        return model.model_validate(given)
    except ValidationError as found:
        for error in found.errors(include_url=False):
            at = (*path, *error["loc"][:1])
            problems.add(tree.at(at).where, at, explain(error, model))
    return None


def _map(tree: Entry, path: tuple[str | int, ...], problems: Problems) -> dict[str, Entry] | None:
    """The map at `path`; an empty value is an empty map."""
    entry = tree.at(path)
    if isinstance(entry.value, dict):
        return entry.value
    if entry.value is None:
        return {}
    problems.add(entry.where, path, f"found {show(entry.plain())}, allowed: a map")
    return None


def _refuse_newer(tree: Entry) -> None:
    """Before anything else: what a newer recipe means by its keys is not for this version to judge."""
    said = tree.value.get("version") if isinstance(tree.value, dict) else None
    if said is not None and isinstance(said.value, (int, float)) and said.value > VERSION:
        raise UserError(
            f"{said.where}: version: found {said.value}, but this autoglm-compress reads version {VERSION}; upgrade it"
        )


def _recipe(tree: Entry, problems: Problems) -> Recipe | None:
    top = _map(tree, (), problems)
    if top is None:
        return None
    given: dict[str, Any] = {key: entry.plain() for key, entry in top.items()}
    parts: dict[str, Any] = {}
    if "data" in given:
        parts["data"] = _data(tree, problems)
    if "steps" in given:
        parts["steps"] = _steps(tree, problems)
    if given.get("gates") is not None:
        gates = _map(tree, ("gates",), problems)
        plain = None if gates is None else {key: entry.plain() for key, entry in gates.items()}
        parts["gates"] = None if plain is None else _checked(Gates, plain, ("gates",), tree, problems)
    given.update(parts)
    try:
        return Recipe.model_validate(given)
    except ValidationError as found:
        for error in found.errors(include_url=False):
            at = error["loc"][:1]
            if not (at and at[0] in parts and parts[str(at[0])] is None):  # that part has had its say
                problems.add(tree.at(at).where, at, explain(error, Recipe))
    return None


def _data(tree: Entry, problems: Problems) -> DataParts | None:
    sources = _map(tree, ("data",), problems)
    if sources is None:
        return None
    specs: dict[str, Any] = {}
    for part, entry in sources.items():
        path = ("data", part)
        if part not in DataParts.model_fields:
            specs[part] = entry.plain()
            continue
        keys = {"source": entry} if isinstance(entry.value, str) else _map(tree, path, problems)
        if keys is not None:
            given = {key: value.plain() for key, value in keys.items()}
            specs[part] = _checked(DataSpec, {**part_default(part).model_dump(), **given}, path, tree, problems)
    return _checked(DataParts, {k: v for k, v in specs.items() if v is not None}, ("data",), tree, problems)


def _steps(tree: Entry, problems: Problems) -> tuple[StepEntry, ...] | None:
    entry = tree.at(("steps",))
    example = "- prune: {ratio: 0.2}"
    if not isinstance(entry.value, list) or not entry.value:
        found = "an empty list" if entry.value == [] else show(entry.plain())
        problems.add(entry.where, ("steps",), f"found {found}, allowed: a list of steps, {example}")
        return None
    steps = [_step(tree, index, problems) for index in range(len(entry.value))]
    good = tuple(step for step in steps if step is not None)
    return good if len(good) == len(steps) else None


def _step(tree: Entry, index: int, problems: Problems) -> StepEntry | None:
    path: tuple[str | int, ...] = ("steps", index)
    entry = tree.at(path)
    names = ", ".join(STEPS)
    if isinstance(entry.value, str) and entry.value in STEPS:  # `- prune`, which YAML reads as text
        entry.value = {entry.value: Entry(None, entry.where)}
    if not isinstance(entry.value, dict) or len(entry.value) != 1:
        found = show(entry.plain())
        if isinstance(entry.value, dict):
            found = f"the keys {', '.join(map(str, entry.value))}" if entry.value else "an empty map"
        problems.add(entry.where, path, f"found {found}, allowed: one key of {names}")
        return None
    kind = str(next(iter(entry.value)))
    path = (*path, kind)
    if kind not in STEPS:
        problems.add(entry.value[kind].where, path, f"unknown step{did_you_mean(kind, STEPS)}")
        return None
    keys_of = _map(tree, path, problems)
    if keys_of is None:
        return None
    given = {key: value.plain() for key, value in keys_of.items()}
    options = _checked(STEPS[kind].options, given, path, tree, problems)
    return None if options is None else StepEntry(kind=kind, options=options)
