"""The tables of docs/recipes.md, from the pydantic models that read recipes. Run as a module, it writes them there.

python -m tests.recipe_docs
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compress import recipe as recipes
from compress.data import DataSpec
from compress.recipe import DataParts, Gates, Recipe, allowed, part_default
from compress.steps import STEPS

PAGE = Path(recipes.__file__).parent.parent / "docs" / "recipes.md"
MODELS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "data": DataParts,
    "source": DataSpec,
    **{name: step.options for name, step in STEPS.items()},
    "gates": Gates,
}
MARKED = re.compile(r"(<!-- keys: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


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


def written(page: str) -> str:
    """`page` with every marked table as it should be."""
    return MARKED.sub(lambda found: found[1] + table(found[2]) + found[4], page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
