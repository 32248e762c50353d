"""The schema says what the loader says: it takes what loads, and refuses what the loader refuses for its structure."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from compress import recipe as recipes
from compress.criteria import CRITERIA
from compress.errors import UserError
from compress.formats import ALIASES, FORMATS
from compress.losses import LOSSES
from compress.recipe import dump, loads
from compress.recipe_schema import recipe_schema
from compress.recipe_yaml import Problems, parse
from tests import mutations, recipe_docs

SCHEMA = recipe_schema()
SHIPPED = sorted(recipe_docs.SCHEMA.parent.glob("*.yaml"))
BASE = {"model": "m", "steps": [{"prune": {"ratio": 0.2}}, {"distill": {}}, {"quantize": {"format": "int8"}}]}


def whole(_: object, value: object) -> bool:
    """To JSON Schema 1.0 is an integer; to the loader, which sees how it is written, it is not."""
    return isinstance(value, int) and not isinstance(value, bool)


CHECKER = Draft202012Validator.TYPE_CHECKER.redefine("integer", whole)
VALIDATOR = extend(Draft202012Validator, type_checker=CHECKER)(SCHEMA)


def takes(value: Any) -> bool:
    return bool(VALIDATOR.is_valid(value))


def read(text: str) -> Any:
    """YAML as the loader sees it, before any model."""
    problems = Problems("r.yaml")
    tree = parse(text, "r.yaml", problems)
    assert tree is not None and not problems.lines
    return tree.plain()


def refusal(value: Any) -> str | None:
    """What the loader has against a recipe, None for nothing."""
    try:
        loads(yaml.safe_dump(value, allow_unicode=True))
    except UserError as error:
        return error.message
    return None


def test_it_is_a_schema_of_its_draft() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_every_key_is_described_and_names_its_choices() -> None:
    for place in [SCHEMA, *SCHEMA["$defs"].values()]:
        for key, schema in place.get("properties", {}).items():
            assert schema["description"].strip(), key
    steps = {name: SCHEMA["$defs"][name]["properties"] for name in ("prune", "distill", "quantize")}
    assert steps["prune"]["criterion"]["enum"] == list(CRITERIA)
    assert steps["distill"]["loss"]["enum"] == list(LOSSES)
    assert steps["quantize"]["format"]["enum"] == [*FORMATS, *ALIASES]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_fits_and_names_it(path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    assert takes(read(text))
    assert takes(read(dump(loads(text))))
    (line,) = [line for line in text.splitlines() if "yaml-language-server" in line]
    _, _, named = line.partition("$schema=")
    assert json.loads((path.parent / named).read_text(encoding="utf-8")) == SCHEMA


@pytest.mark.parametrize(
    "change",
    [
        {"steps": ["prune", "distill"]},
        {"steps": [{"prune": None}]},
        {"data": None, "gates": None, "teacher": None},
        {"data": {"calibration": "a.txt", "training": None, "evaluation": {"samples": None}}},
        {"data": {"calibration": {"source": {"a.txt": 1, "b.txt": 0.5}, "samples": 8}}},
        {"gates": {"max_kl": None, "max_bytes": 10**12}, "version": 1, "keep_intermediate": False, "seed": 0},
    ],
)
def test_short_forms(change: dict[str, Any]) -> None:
    assert refusal(BASE | change) is None
    assert takes(BASE | change)


@pytest.mark.parametrize(
    "change",
    [
        {"modle": "x"},
        {"version": 2},
        {"version": None},
        {"model": ""},
        {"model": None},
        {"seed": 2**32},
        {"seed": True},
        {"seed": None},
        {"evaluate": "eahc"},
        {"keep_intermediate": "no"},
        {"steps": None},
        {"steps": []},
        {"steps": {}},
        {"steps": "prune"},
        {"steps": ["quantize"]},
        {"steps": ["pruen"]},
        {"steps": [None]},
        {"steps": [{}]},
        {"steps": [{"quantize": None}]},
        {"steps": [{"prune": {}, "distill": {}}]},
        {"steps": [{"prune": "ratio"}]},
        {"steps": [{"prune": {"ratoi": 0.2}}]},
        {"steps": [{"prune": {"ratio": 1.0}}]},
        {"steps": [{"prune": {"ratio": "0.2"}}]},
        {"steps": [{"prune": {"criterion": "wnada"}}]},
        {"steps": [{"prune": {"keep_ffn": 8.5}}]},
        {"steps": [{"prune": {"refit": None}}]},
        {"steps": [{"quantize": {"format": "it8"}}]},
        {"data": "builtin"},
        {"data": {"evalution": "x"}},
        {"data": {"training": {"length": 4}}},
        {"data": {"training": {"length": None}}},
        {"data": {"training": 3}},
        {"data": {"training": ["a.txt"]}},
        {"gates": {}},
        {"gates": {"max_kl": None}},
        {"gates": {"max_kl": 0}},
        {"gates": {"min_top1_agreement": 1.5}},
    ],
    ids=str,
)
def test_what_the_loader_refuses_for_its_structure(change: dict[str, Any]) -> None:
    assert refusal(BASE | change) is not None
    assert not takes(BASE | change)


def test_random_recipes_are_judged_as_the_loader_judges_them() -> None:
    """Shipped recipes changed at random: what loads fits, and what is refused does not, but for what no schema can say:
    values that a validator of ours reads further."""
    bases = [read(path.read_text(encoding="utf-8")) for path in SHIPPED]
    loaded = refused = 0
    for number in range(400):
        dice = random.Random(number)
        tree = json.loads(json.dumps(dice.choice(bases)))
        for _ in range(dice.choice([1, 1, 2])):
            (mutations.change if dice.random() < 0.5 else mutations.nudge)(tree, dice)
        text, problems = yaml.safe_dump(tree, allow_unicode=True), Problems("r.yaml")
        parsed = parse(text, "r.yaml", problems)
        if parsed is None or problems.lines:
            continue  # no YAML of ours
        try:
            loads(text)
        except UserError as error:
            further = re.search("or text such as|allowed: a source|the share of", error.message)
            assert further or not takes(parsed.plain()), (error.message, text)
            refused += 1
        else:
            assert takes(parsed.plain()), text
            loaded += 1
    assert loaded > 100 and refused > 100


def test_the_files_written_from_code_are_those() -> None:
    for path, text in recipe_docs.written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: python -m tests.recipe_docs writes it anew"
    assert sorted(path.stem for path in SHIPPED) == sorted(recipes.recipes())
