"""Properties of whole runs: a recipe is its steps one by one, a rerun is the same bytes, planned is written."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from compress.cli import main
from compress.formats import FORMATS
from compress.machine import Machine
from compress.plan import make_plan
from compress.receipt import load_receipt
from compress.recipe import load
from compress.run import run
from tests import tiny
from tests.stock import load as load_model

MOMENT = {"measured.json"}  # what may differ between two runs: nothing else
RECIPE = """
model: {model}
data:
  calibration: {{samples: 6, length: 64}}
  training: {{samples: 8, length: 64}}
  evaluation: {{samples: 4, length: 64}}
steps:
  - prune: {{ratio: 0.3{heads}}}
  - distill: {{max_steps: 2, batch: 4}}
  - quantize: {{format: {format}}}
evaluate: each
"""


def write(folder: Path, model: Path, format: str = "bnb-int8", heads: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, format=format, heads=heads))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("family", ["llama", "glm4v"])
def test_a_recipe_is_its_steps_one_by_one(family: str, tmp_path: Path) -> None:
    source = getattr(tiny, family)(tmp_path / "source")
    heads = ["--heads", "0.5"] if family == "llama" else []
    recipe = write(tmp_path, source, heads=", heads: 0.5" if heads else "")
    whole = tmp_path / "whole"
    assert main(["run", str(recipe), "-o", str(whole), "--threads", "1", "-q"]) == 0
    a, b, c = (tmp_path / name for name in "abc")
    common = ["--length", "64", "--threads", "1", "-q"]
    prune = ["prune", str(source), "-o", str(a), "--ratio", "0.3", *heads, "--samples", "6", *common]
    distill = ["distill", str(a), "--teacher", str(source), "-o", str(b), "--max-steps", "2", "--batch", "4"]
    assert main(prune) == 0
    assert main([*distill, "--samples", "8", *common]) == 0
    assert main(["quantize", str(b), "-o", str(c), "--format", "bnb-int8", "--threads", "1", "-q"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (c / name).read_bytes(), name
    scores = "sensitivity/1-prune/importance.safetensors"
    assert (whole / scores).read_bytes() == (a / scores).read_bytes()


def test_a_lone_command_is_the_recipe_it_writes(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    arguments = ["--ratio", "0.3", "--samples", "6", "--length", "64", "--seed", "3", "--threads", "1", "-q"]
    assert main(["prune", str(source), "-o", str(tmp_path / "a"), *arguments]) == 0
    again = ["run", str(tmp_path / "a" / "recipe.yaml"), "-o", str(tmp_path / "b"), "--threads", "1", "-q"]
    assert main(again) == 0
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name] and name not in MOMENT] == []


def test_a_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tiny.glm4v(tmp_path / "source")
    recipe = load(write(tmp_path, source))
    first = contents(run(recipe, tmp_path / "a", Machine(1)).out)
    second = contents(run(recipe, tmp_path / "b", Machine(1)).out)
    assert first.keys() == second.keys() and len(first) > 8
    assert [name for name in first if first[name] != second[name] and name not in MOMENT] == []


# every format with one family, and every other family with one format
OTHERS = ["qwen2", "qwen3", "smollm3", "glm", "glm4", "phi3"]
PAIRS = [*(("llama", each) for each in FORMATS), *zip([*OTHERS, "glm4v"], itertools.cycle(FORMATS), strict=False)]


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_planned_is_written(family: str, format: str, tmp_path: Path) -> None:
    source = getattr(tiny, family)(tmp_path / "source")
    heads = ", heads: 0.5" if family in OTHERS else ""
    recipe = load(write(tmp_path, source, format, heads), ["steps.1.max_steps=1"])
    plan = make_plan(recipe, Machine(1))
    out = run(recipe, tmp_path / "out", Machine(1)).out
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) == plan.steps[-1].nbytes
    receipt = load_receipt(out)
    stages = {row["stage"]: row for row in receipt["stages"]}
    assert list(stages) == ["dense", "1-prune", "2-distill", "3-quantize"]
    for step, row in zip(plan.steps, list(stages.values())[1:], strict=True):
        assert row["bytes"] == step.nbytes
        assert row["parameters"] == step.parameters


def test_the_work_folder_goes_and_stays_when_asked(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    recipe = load(write(tmp_path, source))
    run(recipe, tmp_path / "a", Machine(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "recipe.yaml", "source"]
    run(recipe, tmp_path / "b", Machine(1), keep_work=True)
    kept = {p.name for p in (tmp_path / "b.work").iterdir()}
    assert {"1-prune", "2-distill"} <= kept


def test_overwrite_replaces_a_result_and_nothing_else(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    out = tmp_path / "out"
    arguments = ["quantize", str(source), "-o", str(out), "--format", "bf16", "-q"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    (out / "stale").touch()
    assert main([*arguments, "--overwrite"]) == 0
    assert not (out / "stale").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious").touch()
    assert main(["quantize", str(source), "-o", str(foreign), "--format", "bf16", "-q", "--overwrite"]) == 2
    assert (foreign / "precious").exists()


def test_what_is_read_or_another_result_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny.llama(tmp_path / "source"), tmp_path / "out"
    cut = ["--ratio", "0.3", "--samples", "4", "--length", "64", "--threads", "1", "-q"]
    assert main(["prune", str(source), "-o", str(out), *cut]) == 0
    text, inner = out / "text.txt", out / "inner"
    text.write_text("a text of which there is one copy\n" * 200)
    measured = ["sensitivity", str(source), "-o", str(inner), "--no-pictures", *cut[2:]]
    for line, said in (
        (["prune", str(source), "--data", str(text), *cut], f"{out}: would replace {text}, which is read"),
        (["prune", str(source), *cut], f"{out}: holds another result, {inner}"),
        (["prune", str(source), "--from-sensitivity", str(inner), *cut], f"{out}: holds another result, {inner}"),
    ):
        if said.endswith(str(inner)) and not inner.exists():
            assert main(measured) == 0
        capsys.readouterr()
        assert main([*line, "-o", str(out), "--overwrite"]) == 2
        assert said in capsys.readouterr().err
    assert text.exists() and (inner / "sensitivity.json").exists()


def test_shards_hold_no_more_than_asked(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    out = tmp_path / "out"
    arguments = ["prune", str(source), "-o", str(out), "--ratio", "0.3", "--samples", "4", "--length", "64", "-q"]
    assert main([*arguments, "--shard-size", "120KB"]) == 0
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2 and (out / "model.safetensors.index.json").exists()
    assert all(path.stat().st_size < 120_000 + 4096 for path in shards)
    assert sum(path.stat().st_size for path in shards) == load_receipt(out)["steps"][0]["bytes"]
    assert load_model(out).config.intermediate_size < 96
