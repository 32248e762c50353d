"""`prune --from-sensitivity`: the ranking of a sensitivity folder, and a plan's prediction; who is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compress
from compress import resume
from compress.cli import main
from compress.curves import DOCUMENT
from compress.data import DataSpec
from compress.errors import UserError
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.sensitivity import Sensitivity, load_sensitivity, removal_order
from compress.steps.prune.options import PruneOptions
from tests import tiny

DATA = {"samples": 8, "length": 64}
ONE = compress.Machine(1)
CUT: dict[str, Any] = {"ffn": 0.25, "heads": 0.5, "data": DATA, "machine": ONE}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("from") / "source")


def measure(source: Path, out: Path, criterion: str) -> Sensitivity:
    return compress.measure_sensitivity(source, out, data=DATA, criterion=criterion, machine=ONE, pictures=False)


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    measure(source, source.parent / "measured", "obs")
    return source.parent / "measured"


@pytest.fixture(scope="module")
def pruned(source: Path, folder: Path) -> Path:
    return compress.prune(source, source.parent / "pruned", from_sensitivity=str(folder), **CUT).out


def test_what_goes_is_the_head_of_the_folders_order(folder: Path, pruned: Path) -> None:
    """In later layers too, where prune's own statistics would be those of pruned layers."""
    told, found = load_sensitivity(folder), load_sensitivity(pruned)
    assert found.criterion == "obs"
    for (layer, group), keep in found.keep.items():
        order = removal_order(told.order[layer, group], told.balance(group))
        assert sorted(keep) == sorted(order[len(order) - len(keep) :])
        assert np.array_equal(found.order[layer, group], told.order[layer, group])


def test_a_ranking_without_statistics_gives_the_very_bytes_of_prune(source: Path, tmp_path: Path) -> None:
    measure(source, tmp_path / "m", "magnitude")
    by_folder = compress.prune(source, tmp_path / "a", from_sensitivity=str(tmp_path / "m"), **CUT).out
    directly = compress.prune(source, tmp_path / "b", criterion="magnitude", **CUT).out
    assert (by_folder / "model.safetensors").read_bytes() == (directly / "model.safetensors").read_bytes()


def test_the_receipt_names_folder_and_prediction(folder: Path, pruned: Path) -> None:
    from compress.curves import read_curves

    [step] = compress.load_receipt(pruned)["steps"]
    assert step["sensitivity"] == {"digest": read_curves(folder).digest, "criterion": "obs", "damping": 0.01}
    assert step["predicted_loss"] == pytest.approx(load_sensitivity(folder).predicted({"ffn": 72, "heads": 4}))
    assert any("predicted rise of the loss" in note for note in step["notes"])


def plan_of(source: Path, folder: Path) -> Any:
    options = PruneOptions(ffn=0.25, from_sensitivity=str(folder))
    return make_plan(Recipe.single("prune", str(source), options), ONE, check_machine=False)


def test_another_ranking_is_another_step(source: Path, folder: Path, tmp_path: Path) -> None:
    """The same path, other content: what an earlier run finished is not taken over."""
    shutil.copytree(folder, tmp_path / "s")
    first = resume.units(plan_of(source, tmp_path / "s"), ONE, 10**9)[0].key
    assert resume.units(plan_of(source, tmp_path / "s"), ONE, 10**9)[0].key == first
    about = json.loads((tmp_path / "s" / DOCUMENT).read_text())
    (tmp_path / "s" / DOCUMENT).write_text(json.dumps(about | {"seed": 1}))
    assert resume.units(plan_of(source, tmp_path / "s"), ONE, 10**9)[0].key != first


@pytest.mark.parametrize(("keep", "beyond"), [(8, False), (7, True)])
def test_a_cut_beyond_the_curves_is_told(keep: int, beyond: bool, source: Path, folder: Path) -> None:
    options = PruneOptions(keep_ffn=keep, from_sensitivity=str(folder))
    recipe = Recipe.single("prune", str(source), options, data=DataSpec(source="builtin", samples=8, length=64))
    (step,) = make_plan(recipe, ONE, check_machine=False).steps
    (note,) = (note for note in step.notes if note.startswith("predicted rise of the loss"))
    assert note.endswith(", at least: layer 0 loses more ffn units than were measured") == beyond


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"refit": False}, "refit: false"),
        ({"damping": 0.5}, "damping: 0.5"),
        ({"joint_refit": 2, "held_out": 0.25}, "held_out: 0.25 and joint_refit: 2"),
        ({"token_weights": "norm"}, "token_weights: norm"),
    ],
)
def test_what_a_prediction_does_not_know_is_told(
    options: dict[str, object], said: str | None, source: Path, folder: Path
) -> None:
    asked = PruneOptions(keep_ffn=64, from_sensitivity=str(folder), **options)
    recipe = Recipe.single("prune", str(source), asked, data=DataSpec(source="builtin", samples=8, length=64))
    (step,) = make_plan(recipe, ONE, check_machine=False).steps
    (note,) = (note for note in step.notes if note.startswith("predicted rise of the loss"))
    assert note.endswith(f"; that is with a plain refit at damping 0.01, not with {said}") == (said is not None)


def test_a_model_that_is_not_where_it_was_measured_is_asked_for(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--from-sensitivity", str(folder), "--ratio", "0.3"]) == 2
    said = capsys.readouterr().err
    assert f"measured on '{source.name}', which is not here\nhint: --model says where the model is" in said
    assert main(["plan", "--from-sensitivity", str(folder), "--ratio", "0.3", "--model", str(source), "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["steps"][0]
    assert f"{step['predicted_loss']:.4f} nats a token" in " ".join(step["notes"])
    assert main(["plan", "--from-sensitivity", str(folder), "--ratio", "0.3", "--model", str(source), "-q"]) == 0
    assert f"predicted rise of the loss: {step['predicted_loss']:.4f} nats a token\n" in capsys.readouterr().out


def test_who_is_refused(source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(told: str, model: Path, place: Path, *more: str) -> None:
        arguments = ["prune", str(model), "-o", str(tmp_path / "x"), "--ffn", "0.25", "--from-sensitivity", str(place)]
        assert main([*arguments, "--threads", "1", *more]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert told in said and "Traceback" not in said
        assert not (tmp_path / "x").exists()

    other = tiny.llama(tmp_path / "other", seed=1)
    refused("is of another model (the digests of config.json and weights differ)", other, folder)
    refused("--from-sensitivity: " + str(tmp_path / "no") + ": no such folder", source, tmp_path / "no")
    refused("--criterion:", source, folder, "--criterion", "flap")
    refused("are ranked by obs, found wanda", source, folder, "--criterion", "wanda")  # the default, but asked for
    refused("not with 'keep_layers'", source, folder, "--keep-layers", "2")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "sensitivity.safetensors").write_bytes(b"0" * 100)
    refused("damaged", source, damaged)
    lacking = tmp_path / "lacking"
    shutil.copytree(folder, lacking)
    about = json.loads((lacking / DOCUMENT).read_text())
    del about["groups"]["ffn"]
    for layer in about["layers"]:
        del layer["groups"]["ffn"]
    (lacking / DOCUMENT).write_text(json.dumps(about))
    refused("was not measured for the 96 ffn of layer 0", source, lacking)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {source}\nevaluate: never\nsteps:\n  - prune: {{keep_heads: 6}}\n"
        f"  - prune: {{ffn: 0.25, from_sensitivity: {folder}}}\n"
    )
    with pytest.raises(UserError, match=r"from_sensitivity: an earlier step changes the model that was measured"):
        compress.plan(recipe)


def test_a_budget_is_planned_from_the_folder_alone(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*arguments: str) -> dict[str, Any]:
        assert main(["plan", "--json", "--no-machine", "--from-sensitivity", str(folder), *arguments]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found["steps"][0]

    losses = []
    for ratio in ("0.1", "0.2", "0.3"):
        [note] = [
            note for note in planned("--model", str(source), "--ratio", ratio)["notes"] if "predicted rise" in note
        ]
        losses.append(float(note.split("loss: ")[1].split()[0]))
    assert 0 < losses[0] < losses[1] < losses[2]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {source}\nevaluate: never\nsteps:\n  - prune: {{ratio: 0.2}}\n")
    step = planned(str(recipe))
    assert (
        step["options"]["from_sensitivity"] == str(folder)
        and step["notes"] == planned("--model", str(source), "--ratio", "0.2")["notes"]
    )


@pytest.mark.parametrize("name", ["null", "20250101", "a: b", "s#x #y"])
def test_a_folder_may_be_called_what_yaml_reads_otherwise(
    name: str,
    source: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, name)
    Path("r.yaml").write_text(f"model: {source}\nevaluate: never\nsteps:\n  - prune: {{ratio: 0.2}}\n")
    assert main(["plan", "r.yaml", "--json", "--no-machine", "--from-sensitivity", name]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["options"]["from_sensitivity"] == name and step["predicted_loss"] > 0


def test_a_path_is_taken_as_a_path(source: Path, folder: Path) -> None:
    named = PruneOptions(ratio=0.2, from_sensitivity=folder)  # type: ignore[arg-type]
    assert named == PruneOptions(ratio=0.2, from_sensitivity=str(folder))


def test_few_tokens_are_told_beside_the_prediction(source: Path, folder: Path, tmp_path: Path) -> None:
    few = {"samples": 2, "length": 64}
    compress.measure_sensitivity(source, tmp_path / "few", data=few, machine=ONE, pictures=False)
    for measured, told in ((folder, ""), (tmp_path / "few", "measured on 1.3 calibration tokens per column, under 4")):
        options = PruneOptions(ratio=0.2, from_sensitivity=str(measured))
        recipe = Recipe.single("prune", str(source), options, data=DataSpec(samples=8, length=64))
        (step,) = compress.plan(recipe).steps
        (note,) = [note for note in step.notes if "predicted rise" in note]
        assert told in note and ("means little" in note) == bool(told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Missing argument 'RECIPE'"),
        (["--ratio", "0.2"], "Missing argument 'RECIPE'"),
        (["demo", "--ratio", "0.2"], "--ratio: the recipe says it"),
        (["demo", "--criterion", "wanda"], "--criterion: the recipe says it"),
        (["demo", "--model", "x"], "--model: the recipe names the model"),
        (["--from-sensitivity", "NOWHERE", "--ratio", "0.2"], "NOWHERE: no such folder"),
        (["--from-sensitivity", "NOWHERE", "--set", "seed=1"], "--set changes a recipe, and none is given"),
    ],
)
def test_wrong_arguments_of_plan_are_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert told in capsys.readouterr().err
