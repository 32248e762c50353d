"""`autoglm-compress sensitivity`: its numbers against stock transformers and autograd, its files, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

import compress
from compress import analysis
from compress.checkpoint.ledger import Ledger
from compress.cli import main
from compress.curves import read_curves
from compress.data import DataSpec, windows
from compress.errors import UserError
from compress.sensitivity import Sensitivity, load_sensitivity, measure, plots, removal_order
from compress.sensitivity.compare import compare, spearman
from compress.sensitivity.heat import WIDTH, heat_map
from compress.sensitivity.outcome import Outcome
from compress.solve import damping_vector, refit
from tests import tiny
from tests.faults.test_resume import interrupt

DATA = {"samples": 8, "length": 64}
FLAGS = ["--samples", "8", "--length", "64", "--threads", "1", "-q"]
ONE = compress.Machine(1)
READERS = {"heads": "self_attn.o_proj", "ffn": "mlp.down_proj"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("analysis") / "source")


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    """The analysis of the pico llama, ranked by obs, with pictures."""
    out = source.parent / "measured"
    assert main(["sensitivity", str(source), "-o", str(out), "--criterion", "obs", "--seed", "3", *FLAGS]) == 0
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> Sensitivity:
    return load_sensitivity(folder)


def stock_statistics(source: Path) -> tuple[dict[tuple[int, str], torch.Tensor], dict[tuple[int, str], torch.Tensor]]:
    """From the whole stock model: the readers' inputs [T, n], and the diagonal of E[g g^T] at their outputs [hidden],
    where g is the gradient of the loss summed over tokens."""
    ids = torch.from_numpy(windows(DataSpec(source="builtin", **DATA), "calibration", source, 3).ids)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(source)
    inputs, outputs = {}, {}
    for layer in range(3):
        for group, name in READERS.items():

            def see(module: Any, args: Any, out: torch.Tensor, key: tuple[int, str] = (layer, group)) -> None:
                del module
                inputs[key] = args[0].detach().flatten(0, 1)
                out.retain_grad()
                outputs[key] = out

            model.get_submodule(f"model.layers.{layer}.{name}").register_forward_hook(see)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return inputs, {key: out.grad.flatten(0, 1).square().sum(0) / tokens for key, out in outputs.items()}


def test_predicted_losses_are_those_of_the_stock_model(source: Path, folder: Path, found: Sensitivity) -> None:
    """1/2 sum_i f_i e_i: f from autograd, e from the refit on the stock model's own activations."""
    inputs, fisher = stock_statistics(source)
    weights = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for (layer, group), x in inputs.items():
        weight, hessian = weights[f"model.layers.{layer}.{READERS[group]}.weight"], x.T @ x / len(x)
        width = weight.shape[1] // len(found.order[layer, group])
        order = torch.from_numpy(removal_order(found.order[layer, group], found.balance(group)))
        curve = read_curves(folder).curves[layer, group]
        half = len(curve.removed) // 2
        for gone, loss in ((int(curve.removed[half]), curve.loss[half]), (1, None)):
            left = order[gone:] if loss is not None else torch.arange(1, len(order))  # else without unit 0
            keep = (left.sort().values[:, None] * width + torch.arange(width)).flatten()
            full = torch.zeros_like(weight)
            full[:, keep] = refit(weight, hessian, keep, damping_vector(hessian, 0.01)).weight
            change = full - weight
            expected = float(((change @ hessian * change).sum(1) * fisher[layer, group]).sum() / 2)
            told = loss if loss is not None else read_curves(folder).unit_loss[layer, group][0]
            assert told == pytest.approx(expected, rel=0.02), (layer, group, gone)


def test_curves_start_at_nothing_and_rise(found: Sensitivity) -> None:
    for group, points in (("heads", [0, 2, 4, 6]), ("ffn", list(range(0, 96, 8)))):
        frame = found.losses(group)
        assert list(frame) == ["layer", "gone", "removed", "loss", "error"]
        for _, part in frame.groupby("layer"):
            assert part.gone.tolist() == points and part.loss.iloc[0] == part.error.iloc[0] == 0
            assert (part.loss.diff().dropna() > 0).all() and part.error.max() < 1


def test_kv_groups_cost_what_their_heads_do(found: Sensitivity) -> None:
    heads, kv = found.units("heads"), found.kv_groups()
    assert (len(heads), len(kv)) == (24, 6)
    summed = heads.groupby([heads.layer, heads.unit // 4]).cost.sum().to_numpy()
    assert np.allclose(summed, kv.cost)
    alone = heads.groupby([heads.layer, heads.unit // 4]).loss.max().to_numpy()
    assert (kv.loss.to_numpy() > alone).all()  # four heads together cost more than the dearest of them


def test_the_first_layer_is_ranked_as_prune_ranks_it(source: Path, found: Sensitivity, tmp_path: Path) -> None:
    """Later layers see pruned ones there, dense ones here."""
    keywords: dict[str, Any] = {"ffn": 0.3, "heads": 0.5, "criterion": "obs", "seed": 3, "data": DATA, "machine": ONE}
    pruned = load_sensitivity(compress.prune(source, tmp_path / "out", **keywords).out)
    for group in ("heads", "ffn"):
        assert np.array_equal(found.order[0, group], pruned.order[0, group])
        assert np.allclose(found.cost[0, group], pruned.cost[0, group])


def test_the_same_command_writes_the_same_bytes_and_the_api_too(source: Path, folder: Path, tmp_path: Path) -> None:
    again = compress.measure_sensitivity(source, tmp_path / "b", data=DATA, criterion="obs", seed=3, machine=ONE)
    first = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    second = {str(p.relative_to(tmp_path / "b")): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert {"sensitivity.json", "sensitivity.safetensors", "pictures/heads.png", "pictures/curves-ffn.svg"} < set(first)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == ["measured.json"]
    assert again.criterion == "obs" and not (tmp_path / "b.work").exists()


def test_the_document_says_how_it_was_made(source: Path, found: Sensitivity) -> None:
    from compress.checkpoint.digests import model_digest

    about = found.about
    assert about["model"]["digest"] == model_digest(source) and about["model"]["family"] == "llama"
    assert about["calibration"]["tokens"] == 512 and about["calibration"]["gradient_windows"] == 8
    assert about["groups"]["ffn"]["tokens_per_column"] == 512 / 96
    assert about["libraries"]["torch"] == torch.__version__ and about["seed"] == 3
    whole = found.layers()
    assert (whole.influence > 0).all() and whole.angular_distance.between(0, 1).all() and (whole.energy > 0).all()
    for row in whole.itertuples():  # the whole module costs more than the largest cut of it
        losses = found.losses(row.group).query(f"layer == {row.layer}").loss
        assert row.loss_without > losses.max()


@pytest.mark.parametrize(("family", "criterion"), [("glm4v", "fisher"), ("phi3", "taylor"), ("qwen3", "flap")])
def test_other_families_are_measured(family: str, criterion: str, tmp_path: Path) -> None:
    source = getattr(tiny, family)(tmp_path / "source")
    keywords: dict[str, Any] = {"data": {"samples": 4, "length": 32}, "machine": ONE, "pictures": False}
    found = compress.measure_sensitivity(source, tmp_path / "out", criterion=criterion, **keywords)
    assert found.criterion == criterion and found.groups == ("heads", "ffn") and found.layer_count == 2
    assert not (tmp_path / "out" / "pictures").exists()
    assert found.predicted({"ffn": 64}) > 0 == found.predicted({})
    units = found.units("ffn").unit.max() + 1
    for wrong in (units + 1, -1, [units]):  # more than there are, fewer than none, not one a layer
        with pytest.raises(UserError, match=f"ffn: found .*allowed: a count from 0 to {units}, or one for each layer"):
            found.predicted({"ffn": wrong})


def test_the_pictures_show_the_frames(found: Sensitivity) -> None:
    image = np.asarray(found.plot_heads().axes[0].images[0].get_array())
    units = found.units("heads")
    assert np.allclose(image[units.unit, units.layer], units.loss)
    lines = found.plot_curves("ffn").axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [11] * 3  # without the point at none: the scale is a log
    assert np.allclose(lines[1].get_ydata(), found.losses("ffn").query("layer == 1 and gone > 0").loss)
    above, below = found.plot_layers().axes
    assert [bar.get_height() for bar in above.patches] == found.layers().query("group == 'ffn'").influence.tolist()
    assert all(axes.get_ylabel() for axes in (above, below)) and isinstance(found.plot_layers(), Figure)
    with pytest.raises(UserError, match="cut nothing"):
        found.plot_cut()
    pictures = (found.plot_heads(), found.plot_curves("ffn"), found.plot_layers())
    assert {picture.get_supxlabel() for picture in pictures} == {"source, obs, 512 tokens of builtin"}
    mixed = {"source": {"self": 0.25, "/data/text.txt": 0.75}, "tokens": 65536}
    about = {**found.about, "calibration": mixed}
    assert dataclasses.replace(found, about=about).plot_layers().get_supxlabel().endswith("self 25% + text.txt 75%")


def said_of(folder: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["sensitivity", str(folder), "--against", str(result), "--no-pictures"]) == 0
    return capsys.readouterr().out


def test_predicted_beside_measured(
    source: Path, folder: Path, found: Sensitivity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {source}\ndata:\n  calibration: {{samples: 8, length: 64}}\n  evaluation: {{samples: 4, length: 64}}\n"
        "evaluate: last\nsteps:\n  - prune: {keep_ffn: 80, keep_heads: 6, criterion: obs}\n"
    )
    receipt = compress.run(recipe, tmp_path / "pruned", machine=ONE).receipt
    assert main(["sensitivity", str(folder), "--against", str(tmp_path / "pruned"), "--no-pictures", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["predicted"] == pytest.approx(found.predicted({"ffn": 80, "heads": 6}))
    dense, after = (stage["perplexity"] for stage in receipt["stages"])
    assert row["measured"] == pytest.approx(np.log(after / dense)) and row["name"] == "pruned"
    assert found.plot_predicted([tmp_path / "pruned"]).axes[0].get_xlabel()
    assert row["otherwise"] == "" and "was pruned with" not in said_of(folder, tmp_path / "pruned", capsys)
    recipe.write_text(recipe.read_text().replace("criterion: obs", "criterion: random, refit: false"))
    compress.run(recipe, tmp_path / "by-chance", machine=ONE)
    told = "by-chance was pruned with criterion: random and refit: false: the prediction is of obs and a plain refit at"
    assert told in said_of(folder, tmp_path / "by-chance", capsys)
    with pytest.raises(UserError, match="scores of a prune step predict no loss"):
        load_sensitivity(tmp_path / "pruned").plot_predicted([tmp_path / "pruned"])
    few = {"samples": 2, "length": 64}
    compress.measure_sensitivity(source, tmp_path / "few", data=few, machine=ONE, pictures=False)
    for measured, told in ((folder, False), (tmp_path / "few", True)):
        assert main(["sensitivity", str(measured), "--against", str(tmp_path / "pruned"), "--no-pictures"]) == 0
        said = capsys.readouterr().out
        assert ("predicted from 1.3 calibration tokens per column, under 4: it means little" in said) == told
    other = tiny.llama(tmp_path / "other", seed=1)
    mine = compress.measure_sensitivity(other, tmp_path / "mine", data=DATA, machine=ONE, pictures=False)
    with pytest.raises(UserError, match="made from another model"):
        mine.plot_predicted([tmp_path / "pruned"])


def test_a_result_that_another_folder_ranked_says_so(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {"data": DATA, "machine": ONE, "pictures": False}
    compress.measure_sensitivity(source, tmp_path / "other", criterion="magnitude", **how)
    recipe, told = tmp_path / "r.yaml", {}
    for name, ranked in (("own", folder), ("others", tmp_path / "other")):
        recipe.write_text(
            f"model: {source}\nevaluate: last\ndata:\n  calibration: {{samples: 8, length: 64}}\n"
            "  evaluation: {samples: 2, length: 64}\n"
            f"steps:\n  - prune: {{keep_ffn: 80, from_sensitivity: {ranked}}}\n"
        )
        compress.run(recipe, tmp_path / name, machine=ONE)
        told[name] = said_of(folder, tmp_path / name, capsys)
    assert "was pruned with" not in told["own"]
    assert "others was pruned with from_sensitivity: another folder, by magnitude: the prediction" in told["others"]
    receipt = tmp_path / "own" / "receipt.json"
    said = json.loads(receipt.read_text())
    del said["stages"][0]["perplexity"]
    receipt.write_text(json.dumps(said))
    assert main(["sensitivity", str(folder), "--against", str(tmp_path / "own"), "--no-pictures"]) == 2
    assert "receipt.json: not a receipt of a run with steps" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_leaves_the_table(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    shutil.rmtree(mine / "pictures", ignore_errors=True)
    (mine / "pictures").write_text("in the way")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {source}\nevaluate: last\ndata:\n  calibration: {{samples: 8, length: 64}}\n"
        "  evaluation: {samples: 2, length: 64}\nsteps:\n  - prune: {keep_ffn: 80, criterion: obs}\n"
    )
    compress.run(recipe, tmp_path / "pruned", machine=ONE)
    line = ["sensitivity", str(mine), "--against", str(tmp_path / "pruned")]
    assert main(line) == 4
    said = capsys.readouterr()
    assert "pruned" in said.out and "pictures: writing failed" in said.err and "--no-pictures" in said.err
    assert main([*line, "--json"]) == 4
    said_so = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in said_so["rows"]] == ["pruned"] and "writing failed" in said_so["error"]["message"]


def test_points_that_are_no_plain_prediction_look_otherwise() -> None:
    outcomes = [
        Outcome("one", 0.2, 0.25, 0.1),
        Outcome("a name that is longer than a picture is wide", 0.9, 0.8, 0.1, at_least=True),
        Outcome("other", 0.3, 0.8, 0.1, otherwise="refit: false"),
    ]
    (axes,) = plots.predicted(outcomes).axes
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["measured as predicted", "predicted: at least", "pruned in another way"]
    names = [text.get_text() for text in axes.texts]
    assert names == ["one", "a name that is...icture is wide", "other"]
    assert [text.get_horizontalalignment() for text in axes.texts] == ["left", "right", "left"]


def test_titles_say_what_there_is_to_see(found: Sensitivity) -> None:
    def title(mine: Sensitivity) -> str:
        return " ".join(mine.plot_heads().axes[0].get_title().split("\n"))

    assert title(found) == "Predicted rise of the loss without each query head white lines: between KV groups"
    name = "hub:org/a-model-of-some-name@0123456789abcdef0123456789abcdef01234567"
    about = {**found.about, "model": {**found.about["model"], "name": name}}
    many = {"source": {f"/data/{'long' * 12}-{i}.txt": 0.25 for i in range(4)}, "tokens": 65536}
    told = dataclasses.replace(found, about={**about, "calibration": many}).plot_layers().get_supxlabel()
    assert told.startswith("a-model-of-some-name@01234567, obs, 65,536 tokens of") and "\n" in told


def test_compare(source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "sensitivity",
        str(source),
        "-o",
        str(tmp_path / "r"),
        "--criterion",
        "random",
        "--no-pictures",
        *FLAGS,
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("layer heads")  # -q leaves out progress and notes, not what was found
    assert main(["sensitivity", "--compare", str(folder), str(folder), "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert len(same["rows"]) == 6 and all((row["spearman"], row["moved"]) == (1, 0) for row in same["rows"])
    assert [group["group"] for group in same["groups"]] == ["heads", "ffn"]
    assert all((group["spearman"], group["moved"]) == (1, 0) and group["gone"] for group in same["groups"])
    rows = compare(load_sensitivity(folder), load_sensitivity(tmp_path / "r"), 0.5)
    for row in rows:
        assert row["gone"] == {"heads": 4, "ffn": 48}[row["group"]]
        assert len(row["only_first"]) == len(row["only_second"]) == row["moved"]
        assert -1 <= row["spearman"] < 0.5 and not set(row["only_first"]) & set(row["only_second"])
    assert main(["sensitivity", "--compare", str(folder), str(tmp_path / "r")]) == 0
    said = capsys.readouterr().out
    assert "spearman" in said and "ffn: mean rank correlation" in said


def test_layers_that_one_side_left_whole_are_not_compared(source: Path, folder: Path, tmp_path: Path) -> None:
    cuts = {"protected": {"protect": ["layers.0.mlp"]}, "shallow": {"keep_layers": 2}}
    sides = {
        name: load_sensitivity(compress.prune(source, tmp_path / name, ffn=0.4, data=DATA, machine=ONE, **cut).out)
        for name, cut in cuts.items()
    }
    [gone] = sides["shallow"].about["depth"]["gone"]
    for name, layers in (("protected", {1, 2}), ("shallow", {0, 1, 2} - {gone})):
        for one, other in ((folder, tmp_path / name), (tmp_path / name, folder)):
            assert {row["layer"] for row in compare(load_sensitivity(one), load_sensitivity(other), 0.5)} == layers
    both = compare(sides["protected"], sides["shallow"], 0.5)
    assert {row["layer"] for row in both} == {1, 2} - {gone}


def test_layers_that_kept_all_their_heads_look_unlike_cheap_ones(source: Path, tmp_path: Path) -> None:
    cut = {"heads": 0.5, "ffn": 0.25, "protect": ["layers.1.self_attn"]}
    found = load_sensitivity(compress.prune(source, tmp_path / "out", data=DATA, machine=ONE, **cut).out)
    assert "heads 8 -> 4 in 2 of them, ffn 96 -> 72)" in repr(found)
    [axes, _] = found.plot_heads().axes
    cells = np.ma.getmaskarray(axes.images[0].get_array())
    assert cells[:, 1].all() and not cells[:, [0, 2]].any()
    assert "8 of 16 heads went in 2 layers; grey: 1 that kept all" in axes.get_title()
    assert "query heads: 8 -> 4 in 2 of 3 layers" in [axes.get_title() for axes in found.plot_cut().axes]


def test_predictions_beyond_what_was_measured_are_told(found: Sensitivity) -> None:
    assert not found.ends_before({"ffn": 72, "heads": 4})
    assert found.ends_before({"ffn": 0}) and found.ends_before({"ffn": [96, 96, 1]})
    assert Outcome("x", 2.0, 3.0, 0.1, at_least=True).told() == "at least 2.0000"


@pytest.mark.parametrize(("cut", "what"), [("keep_layers: 2", "whole layers"), ("keep_kv_heads: 1", "KV heads")])
def test_what_an_analysis_does_not_predict_is_not_shown_beside_it(
    cut: str, what: str, source: Path, found: Sensitivity, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {source}\ndata:\n  calibration: {{samples: 8, length: 64}}\n  evaluation: {{samples: 4, length: 64}}\n"
        f"evaluate: last\nsteps:\n  - prune: {{keep_ffn: 80, {cut}}}\n"
    )
    compress.run(recipe, tmp_path / "pruned", machine=ONE)
    with pytest.raises(UserError, match=f"its prune step cut {what} too"):
        found.plot_predicted([tmp_path / "pruned"])


def test_an_ffn_of_one_step_has_no_curve(tmp_path: Path) -> None:
    """Its width has no multiple of 8 below it, as that of a model pruned to 8 neurons."""
    source = tiny.llama(tmp_path / "source", intermediate_size=8)
    found = compress.measure_sensitivity(source, tmp_path / "out", data=DATA, machine=ONE)
    assert (found.losses("ffn").gone == 0).all() and found.losses("heads").gone.max() == 6
    assert {path.stem for path in (tmp_path / "out" / "pictures").iterdir()} == {"curves-heads", "heads", "layers"}
    assert heat_map(found)


def test_spearman_is_the_correlation_of_ranks() -> None:
    first, second = (np.random.default_rng(seed).permutation(50) for seed in (0, 1))
    assert spearman(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])


@pytest.mark.parametrize("sizes", [(8, 2, 3), (64, 8, 40), (9, 3, 30), (128, 8, 2)], ids=str)
def test_the_heat_map_fits_and_tells_without_colour(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    from tests.unit import test_curves

    heads, kv, layers = sizes
    units = {"heads": (heads, heads // kv, 8), "ffn": (16, 16, 1)}
    found = load_sensitivity(test_curves.write(tmp_path / "s", layers, units))
    lines = [line.plain for line in heat_map(found)]
    assert len([line for line in lines if line[:5].strip().isdigit()]) in (layers, 2 * layers)
    assert max(map(len, lines[:layers])) <= WIDTH or heads > 70
    first = next(line for line in lines if line.startswith("    0 "))
    assert first[6] == "." and "@" in first  # the losses ascend with the unit: from least to most


REFUSED = {
    "nothing": ([], "found other arguments"),
    "two things": (["A", "-o", "B", "--compare", "A", "B"], "found other arguments"),
    "a model without -o": (["demo:nothing"], "no folder to show"),
    "a model's folder without -o": (["MODEL"], "a model, not a folder of scores\nhint: give -o OUT to measure it"),
    "a folder of scores with -o": (
        ["MEASURED", "-o", "B"],
        "a folder of scores, not a model",
    ),
    "an analysis in the place of a result": (["MEASURED", "--against", "MEASURED"], "an analysis, not a pruned model"),
    "no model": (["MISSING/x/y", "-o", "B"], "MISSING/x/y"),
    "how, and nothing to measure": (["A", "--criterion", "obs"], "--criterion: says how a model is measured"),
    "a share, and nothing to compare": (["A", "--cut", "0.3"], "--cut: says at which share --compare counts"),
    "a text, and nothing to measure": (["A", "--samples", "8"], "--samples: says how a model is measured"),
    "a bad cut": (["--compare", "A", "B", "--cut", "1.5"], "--cut: found '1.5', allowed: a number above 0 and below 1"),
    "a criterion nobody knows": (["A", "-o", "B", "--criterion", "wandas"], "unknown criterion 'wandas'; did you mean"),
    "no windows": (["A", "-o", "B", "--gradient-samples", "0"], "--gradient-samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_one_line(
    case: str, source: Path, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, told = REFUSED[case]
    places = {"A": tmp_path / "A", "B": tmp_path / "B", "MODEL": source, "MEASURED": folder}
    capsys.readouterr()
    assert main(["sensitivity", *(str(places.get(each, each)) for each in arguments)]) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said


def test_what_cannot_be_measured_is_refused_before_any_work(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int, told: str, *arguments: str) -> None:
        assert main(["sensitivity", *arguments, *FLAGS]) == code
        assert told in capsys.readouterr().err
        assert not (tmp_path / "x").exists()

    out = ["-o", str(tmp_path / "x")]
    refused(2, "exists already", str(source), "-o", str(folder))
    refused(2, "is not a result of ours (no sensitivity.json)", str(source), "-o", str(source), "--overwrite")
    quantized = compress.quantize(source, tmp_path / "q", format="int8", machine=ONE).out
    refused(2, "the model is quantized", str(quantized), *out)
    refused(2, "--data", str(source), *out, "--data", str(tmp_path / "no.txt"))
    refused(4, "the analysis needs about", str(source), *out, "--memory", "1MB")
    capped = tiny.gemma3_text(tmp_path / "capped", final_logit_softcapping=2.0)
    refused(2, "the gradient of the loss is needed", str(capped), *out)
    few = ["--samples", "1", "--length", "64"]
    assert main(["sensitivity", str(source), *out, *few, "-q"]) == 2
    assert "64 calibration tokens for a Gram matrix of 96 columns" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(2, "or --no-pictures", str(source), *out)


def test_overwrite_replaces_an_analysis(source: Path, tmp_path: Path) -> None:
    arguments = ["sensitivity", str(source), "-o", str(tmp_path / "x"), "--no-pictures", *FLAGS]
    assert main(arguments) == 0 and main([*arguments, "--criterion", "magnitude", "--overwrite"]) == 0
    assert load_sensitivity(tmp_path / "x").criterion == "magnitude"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize(
    ("owner", "name", "at", "left"),
    [
        (Ledger, "save", 1, 3),  # after the backward pass
        (Ledger, "save", 3, 1),
        (measure._Layer, "measure", 2, 2),  # measured, and not yet kept
        (analysis, "_document", 1, 0),
    ],
)
def test_interrupted_anywhere_it_goes_on_and_ends_with_the_same_bytes(
    owner: Any,
    name: str,
    at: int,
    left: int,
    source: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x"
    line = ["sensitivity", str(source), "-o", str(out), "--criterion", "obs", "--seed", "3", *FLAGS]
    with monkeypatch.context() as patched:
        interrupt(patched, owner, name, at)
        assert main([*line, "--checkpoint-every", "0"]) == 130
    said = capsys.readouterr().err
    assert (
        said.startswith("error: interrupted\nhint: finished work is kept in") and "to go on: autoglm-compress" in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.work"]
    (tmp_path / "x.work" / "result").mkdir(exist_ok=True)  # as one that is killed while it writes leaves it
    (tmp_path / "x.work" / "result" / "sensitivity.json").write_text("{")
    done: list[int] = []
    real = measure._Layer.measure

    def counted(self: Any, *arguments: Any) -> Any:
        done.append(self.index)
        return real(self, *arguments)

    monkeypatch.setattr(measure._Layer, "measure", counted)
    monkeypatch.setattr(measure, "gradients", None)  # it is not taken again
    assert main(line) == 0
    assert done == list(range(3 - left, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    for each in ("sensitivity.json", "sensitivity.safetensors"):
        assert (out / each).read_bytes() == (folder / each).read_bytes()


def test_what_is_left_of_another_analysis_is_not_taken_over(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["sensitivity", str(source), "-o", str(tmp_path / "x"), *FLAGS]
    with monkeypatch.context() as patched:
        interrupt(patched, Ledger, "save", 2)
        assert main([*line, "--criterion", "wanda", "--seed", "3", "--checkpoint-every", "0"]) == 130
    assert main([*line, "--criterion", "obs", "--seed", "3"]) == 0
    tensors = "sensitivity.safetensors"
    assert (tmp_path / "x" / tensors).read_bytes() == (folder / tensors).read_bytes()


@pytest.mark.parametrize("more", [["--checkpoint-every", "1000"], ["--checkpoint-every", "0", "--discard"]])
def test_where_nothing_is_kept_nothing_is_left(
    more: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, measure._Layer, "measure", 2)
    assert main(["sensitivity", str(source), "-o", str(tmp_path / "x"), "--no-pictures", *FLAGS, *more]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow_name_their_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny.llama(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert main(["sensitivity", str(source), "-o", str(tmp_path / "x"), "--no-pictures", *FLAGS]) == 2
    assert "layer 1 ffn" in capsys.readouterr().err


def test_heads_with_a_kv_head_each_have_no_curve(tmp_path: Path) -> None:
    """None of them can go alone: their losses are told, the FFN's curves are used, and the picture is left out."""
    source, out = tiny.llama(tmp_path / "source", num_key_value_heads=8), tmp_path / "out"
    assert main(["sensitivity", str(source), "-o", str(out), *FLAGS]) == 0
    shown = load_sensitivity(out)
    assert len(shown.units("heads")) == len(shown.kv_groups()) == 3 * 8 and (shown.losses("heads").gone == 0).all()
    assert {path.stem for path in (out / "pictures").iterdir()} == {"curves-ffn", "heads", "layers"}
    with pytest.raises(UserError, match="no heads of any layer can go"):
        shown.plot_curves("heads")
    for number, allocation in enumerate(("uniform", "per-layer")):
        flags = ["--from-sensitivity", str(out), "--ratio", "0.3", "--allocation", allocation, *FLAGS]
        assert main(["prune", str(source), "-o", str(tmp_path / str(number)), *flags]) == 0
        keep = json.loads((tmp_path / str(number) / "receipt.json").read_text())["steps"][0]["keep"]
        assert keep["heads"] == 8
