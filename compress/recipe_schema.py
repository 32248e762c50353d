"""The JSON Schema (draft 2020-12) of a recipe, from the models that read recipes: for editors, and for other tools.

What the loader refuses for its structure the schema refuses as well: unknown keys, wrong types, values out of bounds,
steps of two keys; it takes the same short forms. recipes/schema.json is this, written by `python -m tests.recipe_docs`.
"""

from __future__ import annotations

import json
from typing import Any

from compress.recipe import Recipe
from compress.steps import STEPS, Step

DRAFT = "https://json-schema.org/draft/2020-12/schema"
FILE = "schema.json"  # its name beside the shipped recipes, whose modelines name it
NULL = {"type": "null"}  # a key without a value: YAML's `prune:`


def modeline(schema: str) -> str:
    """The comment by which editors find the schema of a YAML file; `schema` is relative to that file."""
    return f"# yaml-language-server: $schema={schema}"


def schema_text() -> str:
    """The schema as a file holds it."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def recipe_schema() -> dict[str, Any]:
    """The schema as plain data. Beyond what the models say it has the forms that the loader makes maps of."""
    top = _for_readers(Recipe.model_json_schema())
    definitions = top.pop("$defs")
    for step in STEPS.values():
        options = _for_readers(step.options.model_json_schema())
        definitions |= options.pop("$defs", {})
        definitions[step.name] = options
    del definitions["StepOptions"]
    definitions["StepEntry"] = {"oneOf": [_alone(), *(_one_key(step) for step in STEPS.values())]}
    top["properties"]["data"]["anyOf"] = [{"$ref": top["properties"]["data"].pop("$ref")}, NULL]
    for part in definitions["DataParts"]["properties"].values():
        part["anyOf"] = [{"type": "string", "minLength": 1}, {"$ref": part.pop("$ref")}, NULL]
    gates = definitions["Gates"]["properties"]
    definitions["Gates"]["anyOf"] = [{"required": [key], "properties": {key: {"not": NULL}}} for key in gates]
    return {"$schema": DRAFT, "title": "Recipe of autoglm-compress", **top, "$defs": definitions}


def _alone() -> dict[str, Any]:
    """`- prune`: the name of a step whose keys all have defaults."""
    names = [step.name for step in STEPS.values() if not _required(step)]
    return {"enum": names, "description": "A step with all its defaults."}


def _one_key(step: Step) -> dict[str, Any]:
    """`- prune: {...}`, and `- prune:` where all keys have defaults."""
    options = {"$ref": f"#/$defs/{step.name}"}
    value = options if _required(step) else {"anyOf": [options, NULL]}
    about = " ".join((step.options.__doc__ or "").split())
    return {
        "type": "object",
        "description": about,
        "properties": {step.name: {"description": about, **value}},
        "required": [step.name],
        "additionalProperties": False,
    }


def _required(step: Step) -> bool:
    return any(field.is_required() for field in step.options.model_fields.values())


def _for_readers(value: Any) -> Any:
    """Without the titles that pydantic makes of names, and descriptions as one line each."""
    if isinstance(value, list):
        return [_for_readers(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _for_readers(item) for key, item in value.items() if not (key == "title" and isinstance(item, str))}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    return kept
