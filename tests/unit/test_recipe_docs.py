"""docs/recipes.md says every key as the models have it, its examples load, and docs/formats.md has every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from compress.arch import family_of
from compress.checkpoint.headers import TensorSpec, read_header
from compress.criteria import CRITERIA
from compress.formats import ALIASES, FORMATS, decoder_linears
from compress.losses import LOSSES
from compress.recipe import loads
from tests import recipe_docs, sparse

PAGE = recipe_docs.PAGE.read_text(encoding="utf-8")
FORMATS_PAGE = recipe_docs.PAGE.with_name("formats.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", recipe_docs.MODELS)
def test_every_key_is_on_the_page_as_the_model_has_it(name: str) -> None:
    found = {match[2]: match[3] for match in recipe_docs.MARKED.finditer(PAGE)}
    assert found[name] == recipe_docs.table(name), "python -m tests.recipe_docs writes it anew"
    rows = found[name].splitlines()[2:]
    assert len(rows) == len(recipe_docs.MODELS[name].model_fields) > 0
    assert all(len(row.split("|")) == 6 and row.split("|")[-2].strip() for row in rows)


def test_the_examples_load() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        loads(block)


@pytest.mark.parametrize("override", re.findall(r"`((?:steps|gates|data)\.[\w.]+=[^`]+)`", PAGE))
def test_the_overrides_work(override: str) -> None:
    text = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    assert loads(text, overrides=[override]) != loads(text, overrides=["data.evaluation.samples=17"])


def test_methods_are_named() -> None:
    for name in (*CRITERIA, *LOSSES, *FORMATS, *ALIASES):
        assert f"`{name}`" in PAGE, name


def section(name: str) -> str:
    """The part of docs/formats.md whose heading names the format."""
    parts = re.split(r"^## ", FORMATS_PAGE, flags=re.MULTILINE)
    (found,) = [part for part in parts if f"`{name}`" in part.splitlines()[0]]
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_section_with_its_tensors(name: str) -> None:
    for tensor in FORMATS[name].stored(TensorSpec("P.weight", "BF16", (6, 8))):
        assert f"`{tensor.name}`" in section(name), tensor


@pytest.mark.parametrize("name", FORMATS)
def test_a_formats_config_is_the_one_it_writes(name: str, tmp_path: Path) -> None:
    header = read_header(sparse.glm41v_9b(tmp_path / "model"))
    planned = FORMATS[name].plan(header, decoder_linears(header, family_of(header)))
    shown = re.findall(r"```json\n(.*?)```", section(name), re.DOTALL)
    assert [json.loads(block) for block in shown] == [
        planned.config[key] for key in ["quantization_config"] if key in planned.config
    ]
