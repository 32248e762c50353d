"""What pydantic says of a wrong value, in the words of our messages: what was found, what is allowed. Torch-free."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress.errors import UserError, did_you_mean, nearest
from compress.recipe_yaml import show


def in_one_line(error: ValidationError, model: type[BaseModel], what: str) -> UserError:
    """Every problem of `error` in one line that opens with `what`."""
    problems = [(".".join(map(str, e["loc"][:1])), explain(e, model)) for e in error.errors(include_url=False)]
    return UserError(f"{what}: " + "; ".join(f"{key}: {text}" if key else text for key, text in problems))


def explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    """A pydantic error about one field of `model`, as one clause: what was found, what is allowed."""
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return "unknown key" + did_you_mean(key, model.model_fields)
    if error["type"] == "missing":
        return f"missing; allowed: {allowed(model, key)}"
    if error["type"] in ("value_error", "assertion_error"):  # raised by a validator of ours: its words are enough
        return error["msg"].split(", ", 1)[-1]
    found = f"found {show(error['input'])}, allowed: {allowed(model, key)}"
    choices = [name for kind in _kinds(model, key) for name in kind.get("enum", ())]
    near = nearest(error["input"], choices) if choices and isinstance(error["input"], str) else None
    return f"{found}; did you mean '{near}'?" if near else found


def allowed(model: type[BaseModel], key: str) -> str:
    """What a field takes, in words: `a number above 0 and below 1`, `text or a whole number above 0`."""
    kinds = _kinds(model, key)
    if any(kind.get("type") == "number" for kind in kinds):  # which a whole number is as well
        kinds = [kind for kind in kinds if kind.get("type") != "integer"]
    return " or ".join(dict.fromkeys(map(_in_words, kinds)))


def _in_words(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("minimum", 0) == schema.get("maximum", 1):
        return str(schema["minimum"])
    kinds = {
        "number": "a number",
        "integer": "a whole number",
        "string": "text",
        "boolean": "true or false",
        "array": "a list",
    }
    words = {
        "exclusiveMinimum": "above {}",
        "minimum": "at least {}",
        "exclusiveMaximum": "below {}",
        "maximum": "at most {}",
    }
    bounds = [text.format(schema[name]) for name, text in words.items() if name in schema]
    kind = kinds.get(schema.get("type", ""), "a map")
    kind += " that is not empty" if schema.get("minLength") else ""
    return f"{kind} {' and '.join(bounds)}".strip()


def _kinds(model: type[BaseModel], key: str) -> list[dict[str, Any]]:
    """The JSON Schemas of what a field takes besides null."""
    schema = _properties(model).get(key, {})
    return [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]


@cache
def _properties(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return properties
