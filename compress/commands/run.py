"""`run RECIPE`: carry out a recipe and print what every stage cost and kept. Lone commands run their one step here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.commands.options import (
    DataFlags,
    MachineFlags,
    Overrides,
    RecipeFile,
    RunFlags,
    ScreenFlags,
    flat,
    told_what_is_kept,
)
from compress.errors import GateError
from compress.prepare import prepare
from compress.recipe import Recipe, find, load
from compress.steps import STEPS
from compress.steps.types import StepOptions

EXAMPLE = "autoglm-compress run demo --set steps.0.ratio=0.25 -o out/demo-25"
Out = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="OUT", help="Folder to write. \\[default: out/RECIPE]", rich_help_panel="Output"
    ),
]


@flat
def run(
    recipe: RecipeFile,
    place: RunFlags,
    machine: MachineFlags,
    show: ScreenFlags,
    output: Out = None,
    overrides: Overrides = None,
) -> None:
    """Carry out a recipe: every step, measured and checked, with a receipt."""
    file = find(recipe)
    run_recipe(load(file, overrides or ()), output or Path("out") / file.stem, place, machine, show, where=str(file))


def run_one(
    kind: str,
    model: str,
    options: StepOptions,
    out: Path,
    data: DataFlags,
    place: RunFlags,
    machine: MachineFlags,
    show: ScreenFlags,
    teacher: str | None = None,
) -> None:
    """Run the recipe whose only step is `kind`: the same code, the same bytes as that recipe in a file."""
    spec = data.spec(STEPS[kind].data)
    recipe = Recipe.single(kind, model, options, teacher=teacher, data=spec, seed=data.seed_number())
    run_recipe(recipe, out, place, machine, show, where=None)


def run_recipe(
    recipe: Recipe, out: Path, place: RunFlags, machine: MachineFlags, show: ScreenFlags, where: str | None
) -> None:
    """Run `recipe` into `out` and print the result, or with --dry-run its plan. `where` names the recipe in messages;
    None: they name flags."""
    screen, limits = show.screen(), machine.machine()
    machine.note(screen)
    if place.dry_run:
        with screen:
            keys = ("overwrite", "stop_after", "shard_bytes")
            given = {key: value for key, value in place.arguments().items() if key in keys}
            made = prepare(recipe, out, limits, progress=screen.progress, where=where, **given)
        screen.plan(made)
        return
    from compress.run import Result
    from compress.run import run as carry_out

    try:
        with told_what_is_kept(), screen:
            result = carry_out(
                recipe,
                out,
                limits,
                progress=screen.progress,
                where=where,
                **place.arguments(),
            )
    except GateError as failed:
        if isinstance(failed.result, Result):
            screen.result(failed.result, failed)  # the numbers that the gate looked at
        raise
    screen.result(result)
