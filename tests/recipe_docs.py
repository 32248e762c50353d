"""What is written from code, so that it cannot lie: tables, the schema, the pages of commands, the API's keywords.

python -m tests.recipe_docs
"""

from __future__ import annotations

import html
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compress import recipe as recipes
from compress.complaints import allowed
from compress.data import DataSpec
from compress.recipe import DataParts, Gates, Recipe, part_default
from compress.recipe_schema import FILE, schema_text
from compress.steps import STEPS

ROOT = Path(recipes.__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"
COMMANDS = ROOT / "docs" / "commands.md"
SCHEMA = ROOT / "recipes" / FILE
SIGNATURES = ROOT / "compress" / "signatures.py"
MODELS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "data": DataParts,
    "source": DataSpec,
    **{name: step.options for name, step in STEPS.items()},
    "gates": Gates,
}
MARKED = re.compile(r"(<!-- keys: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARKED_CODE = re.compile(r"(?<=# keys of the steps\n).*(?=# end\n)", re.DOTALL)
TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "None"}
TYPES |= {"array": "list[str]", "object": "dict[str, int]"}


def table(name: str) -> str:
    """The Markdown table of one model's keys."""
    model = MODELS[name]
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        default = "required" if field.is_required() else shown(field.get_default(), key)
        rows.append(f"| `{key}` | {allowed(model, key)} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def shown(value: Any, key: str) -> str:
    """A default as the page shows it."""
    if value is None:
        return "-"
    if isinstance(value, DataSpec):
        given = {k: v for k, v in part_default(key).model_dump().items() if v is not None}
        return "`{" + ", ".join(f"{k}: {v}" for k, v in given.items()) + "}`"
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def recipe_page(page: str) -> str:
    """docs/recipes.md with every marked table as it should be."""
    return MARKED.sub(lambda found: found[1] + table(found[2]) + found[4], page)


def command_page() -> str:
    """docs/commands.md: every help page."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from compress.cli import PROGRAM, app

    command: Any = get_command(app)
    context: Any = command.context_class(command, info_name=PROGRAM)
    text = html.unescape(get_docs_for_click(obj=command, ctx=context, name=PROGRAM)).replace("\\[", "[")
    return re.sub(r"Example:\n\n(.+)", r"Example:\n\n```console\n$ \1\n```", text).rstrip() + "\n"


def signatures(code: str) -> str:
    """compress/signatures.py with the classes of the steps as they should be."""
    table = ", ".join(f'"{name}": {name.capitalize()}Keywords' for name in STEPS)
    parts = [*map(_keywords_of, STEPS), f"STEP_KEYWORDS: dict[str, Any] = {{{table}}}"]
    return MARKED_CODE.sub(lambda _: "\n\n" + "\n\n\n".join(parts) + "\n", code)


def _keywords_of(name: str) -> str:
    model = STEPS[name].options
    lines = [f"class {name.capitalize()}Keywords(StepKeywords, total=False):", f'    """Of `{name}`."""', ""]
    for key, schema in model.model_json_schema()["properties"].items():
        types = list(dict.fromkeys(_types(schema)))
        if "float" in types and "int" in types:
            types.remove("int")  # to a type checker every int is a float
        annotation = " | ".join(types)
        lines.append(f"    {key}: {f'Required[{annotation}]' if model.model_fields[key].is_required() else annotation}")
        lines += _docstring(str(schema["description"]))
    return "\n".join(lines)


def _types(schema: dict[str, Any]) -> Iterator[str]:
    for kind in schema.get("anyOf", [schema]):
        yield TYPES[kind["type"]]


def _docstring(text: str) -> list[str]:
    lines = textwrap.wrap(text, 120 - 4 - 6)
    if len(lines) == 1:
        return [f'    """{lines[0]}"""']
    lines = textwrap.wrap(text, 120 - 4 - 3)
    return [f'    """{lines[0]}', *(f"    {line}" for line in lines[1:]), '    """']


def written() -> dict[Path, str]:
    """Every file that is written here, and what should stand in it."""
    return {
        PAGE: recipe_page(PAGE.read_text(encoding="utf-8")),
        SIGNATURES: signatures(SIGNATURES.read_text(encoding="utf-8")),
        SCHEMA: schema_text(),
        COMMANDS: command_page(),
    }


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
