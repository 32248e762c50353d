"""`plan RECIPE`: what a recipe will do and cost, from headers alone; or a budget, from a sensitivity folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.commands.options import MachineFlags, Overrides, ScreenFlags, flag, flat
from compress.errors import UserError
from compress.recipe import Recipe, find, load
from compress.steps.prune.options import PruneOptions

EXAMPLE = "autoglm-compress plan demo --no-machine"
NoMachine = Annotated[bool, typer.Option("--no-machine", help="Leave out memory and disk: only check the recipe.")]
RecipeFile = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe; without it, --from-sensitivity DIR and a budget for the "
        "model that was measured there.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Without RECIPE: where the model is that was measured. \\[default: as the folder names it]",
    ),
]


@flat
def plan(
    machine: MachineFlags,
    show: ScreenFlags,
    options: PruneOptions,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    no_machine: NoMachine = False,
    model: Model = None,
) -> None:
    """Show what a recipe will do: shapes, parameters, bytes, memory. Reads no weight."""
    screen, limits = show.screen(), machine.machine()
    if recipe is None:
        read, where = _budget(options, overrides, model), None
    else:
        if model is not None:
            raise UserError("--model: the recipe names the model")
        file = find(recipe)
        read, where = _with_folder(str(file), options, list(overrides or ())), str(file)
    machine.note(screen)
    from compress.plan import make_plan

    with screen:
        made = make_plan(read, limits, check_machine=not no_machine, progress=screen.progress, where=where)
    screen.plan(made)


def _budget(options: PruneOptions, overrides: list[str] | None, model: str | None) -> Recipe:
    """The prune step of a sensitivity folder's model."""
    if options.from_sensitivity is None:
        raise UserError("Missing argument 'RECIPE'", hint="or give --from-sensitivity DIR and a budget")
    if overrides:
        raise UserError("--set changes a recipe, and none is given")
    from compress.curves import read_curves

    folder = options.from_sensitivity
    found = read_curves(Path(folder).expanduser())
    name = model or str(found.about["model"].get("name"))
    if model is None and not name.startswith("demo:") and "/" not in name and not Path(name).exists():
        raise UserError(f"{folder}: measured on '{name}', which is not here", hint="--model says where the model is")
    return Recipe.single("prune", name, options)


def _with_folder(file: str, options: PruneOptions, overrides: list[str]) -> Recipe:
    """The recipe in `file`, whose first prune step takes its ranking from --from-sensitivity, if that is given."""
    folder = options.from_sensitivity
    other = [key for key in PruneOptions.model_fields if key in options.model_fields_set - {"from_sensitivity"}]
    if other:
        raise UserError(f"{flag(other[0])}: the recipe says it", hint=f"--set steps.0.{other[0]}=... changes it")
    read = load(Path(file), overrides)
    if folder is None:
        return read
    index = next((number for number, entry in enumerate(read.steps) if entry.kind == "prune"), None)
    if index is None:
        raise UserError(f"--from-sensitivity: {file} has no prune step")
    return load(Path(file), [*overrides, f"steps.{index}.from_sensitivity={json.dumps(folder)}"])
