"""`recipes list | show | copy | schema`: what recipes there are, and what one may say."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.evaluate import check_writable, write_text
from compress.commands.options import RecipeFile, ScreenFlags, flat
from compress.errors import UserError
from compress.recipe import find, load, recipes
from compress.recipe_schema import FILE, modeline, schema_text
from compress.recipe_yaml import read_text

MODELINE = re.compile(r"^#\s*yaml-language-server:\s*\$schema=(\S*).*\n?", re.MULTILINE)
File = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")]


@flat
def list_recipes(show: ScreenFlags) -> None:
    """List the recipes that are known by name: those shipped, and those in ./recipes."""
    show.screen().recipes([_row(name, file) for name, file in sorted(recipes().items())])


@flat
def show_recipe(recipe: RecipeFile, show: ScreenFlags) -> None:
    """Print a recipe as it stands in its file."""
    screen, file = show.screen(), find(recipe)
    if show.json:
        return screen.said({"file": str(file), "recipe": load(file).model_dump(mode="json")}, "")
    screen.yaml(read_text(file))


@flat
def copy_recipe(recipe: RecipeFile, show: ScreenFlags, output: File = None, overwrite: Overwrite = False) -> None:
    """Copy a recipe, to change it. Without -o into the current directory, under its own name."""
    screen, file = show.screen(), find(recipe)
    target = output or Path(file.name)
    check_writable(target, overwrite)
    text = for_folder(read_text(file), target.parent)
    write_text(target, text)
    line = f"wrote {target}; to run it: autoglm-compress run {target}"
    if not MODELINE.search(text):
        line += f"\nfor an editor that checks it: autoglm-compress recipes schema -o {target.parent / FILE}"
    screen.said({"file": str(target)}, line)


@flat
def print_schema(show: ScreenFlags, output: File = None, overwrite: Overwrite = False) -> None:
    """Print the JSON Schema of a recipe, for editors and other tools."""
    screen = show.screen()
    if output is None:
        print(schema_text(), end="")
        return
    check_writable(output, overwrite)
    write_text(output, schema_text())
    screen.said({"file": str(output)}, f"wrote {output}; a recipe beside it names it: {modeline(output.name)}")


COMMANDS = (
    ("list", list_recipes, "autoglm-compress recipes list"),
    ("show", show_recipe, "autoglm-compress recipes show demo"),
    ("copy", copy_recipe, "autoglm-compress recipes copy demo -o mine.yaml"),
    ("schema", print_schema, "autoglm-compress recipes schema -o schema.json"),
)


def for_folder(text: str, folder: Path) -> str:
    """The recipe as it may stand in `folder`: its line for editors names a file, by default beside the recipe, and goes
    unless that file is our schema there as well."""

    def kept(line: re.Match[str]) -> str:
        with suppress(OSError, ValueError):  # not readable, or no file name
            if "://" in line[1] or (folder / line[1]).read_bytes() == schema_text().encode():
                return line[0]
        return ""

    return MODELINE.sub(kept, text)


def _row(name: str, file: Path) -> dict[str, Any]:
    """One recipe of a list; for a file that is none, what is wrong with it."""
    try:
        found = load(file)
        what, model, steps = about(read_text(file)), found.model, [step.kind for step in found.steps]
    except UserError as error:
        what, model, steps = f"no recipe: {error.message.splitlines()[0]}", None, []
    return {"name": name, "what": what, "model": model, "steps": steps, "file": str(file)}


def about(text: str) -> str:
    """What a recipe's first comment says it is: the line, without the command that runs it."""
    for line in text.splitlines():
        said = line.lstrip("#").strip()
        if not line.startswith("#"):
            break
        if said and not MODELINE.match(line):
            command, gap, what = said.partition("     ")
            return what.strip() if gap and command.startswith("autoglm-compress ") else said
    return ""
