"""`plan RECIPE`: what a recipe will do and cost, from headers alone."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.commands.options import MachineFlags, Overrides, RecipeFile, ScreenFlags, flat
from compress.recipe import find, load

EXAMPLE = "autoglm-compress plan demo --no-machine"
NoMachine = Annotated[bool, typer.Option("--no-machine", help="Leave out memory and disk: only check the recipe.")]


@flat
def plan(
    recipe: RecipeFile,
    machine: MachineFlags,
    show: ScreenFlags,
    overrides: Overrides = None,
    no_machine: NoMachine = False,
) -> None:
    """Show what a recipe will do: shapes, parameters, bytes, memory. Reads no weight."""
    screen, file, limits = show.screen(), find(recipe), machine.machine()
    machine.note(screen)
    from compress.plan import make_plan

    read = load(file, overrides or ())
    with screen:
        made = make_plan(read, limits, check_machine=not no_machine, progress=screen.progress, where=str(file))
    screen.plan(made)
