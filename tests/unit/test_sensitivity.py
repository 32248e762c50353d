"""Saved scores read back: frames that agree with the checkpoint that was cut, and files that lie are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import compress
from compress.criteria import CRITERIA
from compress.errors import UserError
from compress.sensitivity import Sensitivity, load_sensitivity, removal_order
from tests import tiny

DATA = {"samples": 6, "length": 64}
ONE = compress.Machine(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("sensitivity") / "source")


@pytest.fixture(scope="module")
def pruned(source: Path) -> Path:
    """Heads 8 -> 4 in two KV groups, FFN 96 -> 72, three layers."""
    return compress.prune(source, source.parent / "pruned", ratio=0.3, heads=0.5, data=DATA, machine=ONE).out


@pytest.fixture
def copy(pruned: Path, tmp_path: Path) -> Path:
    """A folder with nothing but the scores."""
    shutil.copytree(pruned / "sensitivity", tmp_path / "copy" / "sensitivity")
    return tmp_path / "copy"


def test_units_are_those_of_the_checkpoint(source: Path, pruned: Path) -> None:
    """The rows of q_proj that stayed are the kept heads' rows, bit for bit (only the reader is refitted)."""
    found = load_sensitivity(pruned)
    heads, ffn = found.units("heads"), found.units("ffn")
    assert list(heads) == ["layer", "unit", "cost", "rank", "kept"]
    assert (len(heads), len(ffn)) == (3 * 8, 3 * 96)
    with (
        safe_open(source / "model.safetensors", "np") as before,
        safe_open(pruned / "model.safetensors", "np") as after,
    ):
        for layer in range(3):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            kept = heads[(heads.layer == layer) & heads.kept].unit.to_numpy()
            rows = before.get_tensor(name).reshape(8, 8, 64)[kept].reshape(-1, 64)
            assert np.array_equal(rows, after.get_tensor(name))
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            kept = ffn[(ffn.layer == layer) & ffn.kept].unit.to_numpy()
            assert np.array_equal(before.get_tensor(name)[kept], after.get_tensor(name))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_went_is_the_head_of_the_ranking(criterion: str, source: Path, tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"heads": 0.5, "ffn": 0.3, "data": DATA, "machine": ONE}
    found = load_sensitivity(compress.prune(source, tmp_path / "out", criterion=criterion, **keywords).out)
    assert found.criterion == criterion
    for group, gone in (("heads", 4), ("ffn", 32)):
        units = found.units(group)
        assert (units.kept == (units["rank"] >= gone)).all()
        for _, layer in units.groupby("layer"):
            assert sorted(layer["rank"]) == list(range(len(layer)))
        if criterion != "obs" and group == "ffn":  # a static score: the cheapest go
            assert (units.sort_values(["layer", "rank"]).groupby("layer").cost.diff().dropna() >= 0).all()


def test_removal_takes_one_of_every_block_in_turn() -> None:
    order = np.array([0, 1, 4, 2, 3, 5])  # blocks {0,1,2} and {3,4,5}
    assert removal_order(order, 3).tolist() == [0, 4, 1, 3, 2, 5]
    assert removal_order(order, 6).tolist() == order.tolist()
    assert removal_order(order, 1).tolist() == order.tolist()


def test_layers_hold_the_receipts_errors_and_the_curves_cost(pruned: Path) -> None:
    found = load_sensitivity(pruned)
    layers = found.layers()
    assert list(zip(layers.layer, layers.group, strict=True)) == [(n, g) for n in range(3) for g in ("heads", "ffn")]
    told = compress.load_receipt(pruned)["steps"][0]["relative_output_error"]
    for row in layers.itertuples():
        said = told[row.layer][row.group]
        assert (row.error, row.error_without_refit) == (said["error"], said["error_without_refit"])
        assert row.error < row.error_without_refit < 1
        assert row.removed == {"heads": 0.5, "ffn": 0.25}[row.group]
        curve = found.curve(row.group)
        curve = curve[curve.layer == row.layer]
        assert (curve.removed.iloc[0], curve.cost.iloc[0]) == (0, 0)
        assert curve.removed.iloc[-1] == 1 and curve.cost.iloc[-1] == pytest.approx(1)
        assert (curve.cost.diff().dropna() >= 0).all() and len(curve) == row.units + 1
        at = curve[curve.gone == row.units - row.kept].cost.item()
        assert at == pytest.approx(row.removed_cost)  # the curve at the cut is what the cut took
        units = found.units(row.group)
        units = units[units.layer == row.layer]
        assert at == pytest.approx(units[~units.kept].cost.sum() / units.cost.sum())


def test_without_statistics_there_is_no_error(source: Path, tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"ffn": 0.3, "criterion": "magnitude", "refit": False, "data": DATA, "machine": ONE}
    found = load_sensitivity(compress.prune(source, tmp_path / "out", **keywords).out)
    assert found.groups == ("ffn",) and found.layers().error.isna().all()
    assert isinstance(found.plot_cut(), Figure)
    with pytest.raises(UserError, match="1-prune has no scores of 'heads'; it cut ffn"):
        found.plot_heads()


def test_the_pictures_show_the_frames(pruned: Path) -> None:
    found = load_sensitivity(str(pruned))
    heads = found.plot_heads().axes[0]
    units = found.units("heads")
    share = units.cost / units.groupby("layer").cost.transform("sum")
    image = np.asarray(heads.images[0].get_array())
    assert image.shape == (8, 3) and np.allclose(image[units.unit, units.layer], share)
    crosses = next(line for line in heads.lines if line.get_marker() == "x")
    assert set(zip(*crosses.get_data(), strict=True)) == set(
        units[~units.kept][["layer", "unit"]].itertuples(index=False)
    )
    curves = found.plot_curves("ffn").axes[0]
    assert sum(len(line.get_xdata()) == 97 for line in curves.lines) == 3  # a line a layer
    dots = [line.get_data() for line in curves.lines if line.get_marker() == "o"]
    layers = found.layers().query("group == 'ffn'")
    assert np.allclose([(x[0], y[0]) for x, y in dots], layers[["removed", "removed_cost"]])
    assert curves.get_yscale() == "log" and "wanda" in curves.get_title()
    assert [note.get_text().strip() for note in curves.texts] == ["the cut: 25.0%"]
    shares, _, errors, _ = found.plot_cut().axes
    heads_rows = found.layers().query("group == 'heads'")
    assert np.allclose([bar.get_height() for bar in shares.patches], heads_rows.removed_cost)
    assert [
        np.allclose(line.get_ydata(), heads_rows[name])
        for line, name in zip(errors.lines, ("error_without_refit", "error"), strict=True)
    ] == [True, True]
    assert all(axes.get_xlabel() for axes in (heads, curves, errors))
    assert all(axes.get_ylabel() for axes in (heads, curves, shares, errors))
    assert [int(label) for label in heads.get_xticks()] == [0, 1, 2]


def test_a_dot_stands_where_whole_groups_went(source: Path, tmp_path: Path) -> None:
    """kv_merge: drop takes the cheapest KV groups, not equally many heads of each: the curve is of another order."""
    out = tmp_path / "dropped"
    compress.prune(source, out, keep_kv_heads=1, kv_merge="drop", data=DATA, machine=ONE)
    found = load_sensitivity(out)
    frame = found.layers().query("group == 'heads'")
    dots = [line for line in found.plot_curves("heads").axes[0].lines if line.get_marker() == "o"]
    assert [tuple(float(axis[0]) for axis in line.get_data()) for line in dots] == [
        (row.removed, row.removed_cost) for row in frame.itertuples()
    ]


def test_shares_on_an_axis_are_not_rounded(source: Path, tmp_path: Path) -> None:
    compress.prune(source, tmp_path / "few", keep_ffn=94, data=DATA, machine=ONE)
    axes = load_sensitivity(tmp_path / "few").plot_cut().axes[0]
    told = [axes.yaxis.get_major_formatter()(at) for at in axes.get_yticks()]
    assert len(set(told)) == len(told) and "0.5%" in told


def test_names_of_lines_that_run_beside_each_other_are_one() -> None:
    from matplotlib.figure import Figure

    from compress.sensitivity.figures import name_outliers

    axes = Figure().subplots()
    name_outliers(axes, dict.fromkeys(range(9), 1.0) | {9: 0.30, 10: 0.25, 11: 0.01})
    assert [text.get_text() for text in axes.texts] == ["layer 11", "layers 9, 10"]
    axes = Figure().subplots()
    name_outliers(axes, dict.fromkeys(range(9), 1.0) | {9: 3.5, 10: 9.0, 11: 3.2}, above=True)
    assert [text.get_text() for text in axes.texts] == ["layer 10", "layers 9, 11"]


def test_pictures_leave_pyplot_alone(pruned: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    picture = load_sensitivity(pruned).plot_cut()
    assert pyplot.get_fignums() == before  # else a notebook shows them twice, and a loop fills the memory
    assert picture._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", ["pandas", "matplotlib"])
def test_a_missing_extra_is_named(module: str, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    found = load_sensitivity(pruned)  # the arrays need neither
    assert found.cost[0, "ffn"].shape == (96,)
    with pytest.raises(UserError, match=f"{module} is not installed") as raised:
        found.plot_curves()
    assert raised.value.hint == "pip install 'autoglm-compress[notebook]'" and raised.value.exit_code == 2
    if module == "pandas":
        with pytest.raises(UserError, match="pandas is not installed"):
            found.units("ffn")


def test_it_says_what_it_is_in_a_line(pruned: Path) -> None:
    assert repr(load_sensitivity(pruned)) == "Sensitivity(1-prune: wanda, 3 layers, heads 8 -> 4, ffn 96 -> 72)"


def test_a_group_nobody_knows_is_refused_with_the_nearest(pruned: Path) -> None:
    found = load_sensitivity(pruned)
    with pytest.raises(UserError, match=r"1-prune has no scores of 'head'; did you mean 'heads'\?"):
        found.units("head")
    with pytest.raises(UserError, match="no scores of 'experts'; allowed: heads, ffn"):
        found.curve("experts")


def test_several_steps_want_a_name(source: Path, copy: Path) -> None:
    shutil.copytree(copy / "sensitivity" / "1-prune", copy / "sensitivity" / "2-prune")
    with pytest.raises(UserError, match="several prune steps") as raised:
        load_sensitivity(copy)
    assert "load_sensitivity(folder, step='1-prune') shows one; found 1-prune, 2-prune" in (raised.value.hint or "")
    assert load_sensitivity(copy, "2-prune").step == "2-prune"
    with pytest.raises(UserError, match="no step '3-prune'; did you mean"):
        load_sensitivity(copy, "3-prune")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_sensitivity(copy / "nowhere")
    with pytest.raises(UserError, match=r"no saved scores; .*source is neither a sensitivity folder nor a prune"):
        load_sensitivity(source)


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__delitem__(key)


def _set(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop("layers.1.ffn.order"), "tensor 'layers.1.ffn.order' is missing"),
        (_set("layers.2.ffn.cost", lambda v: v[:-1]), r"layers.2.ffn: \[95\] costs, importance.json says 96 units"),
        (_set("layers.0.heads.cost", lambda v: v * np.nan), "layers.0.heads: a cost is NaN or infinite"),
        (_set("layers.0.heads.order", lambda v: v * 0), "layers.0.heads: order is not a permutation of 8 units"),
        (_set("layers.0.heads.keep", lambda v: v + 8), "layers.0.heads: keep does not name units below 8, each once"),
        (_set("layers.0.heads.keep", lambda v: v * 0), "layers.0.heads: keep does not name units below 8, each once"),
    ],
)
def test_damaged_scores_are_refused(damage: Callable[[dict[str, Any]], None], message: str, copy: Path) -> None:
    path = copy / "sensitivity" / "1-prune" / "importance.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"importance.safetensors: {message}"):
        load_sensitivity(copy)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"criterion": 1},
        {"groups": {"heads": {"units": 8, "keep": 4}}},
        {"groups": {"heads": {"units": 8, "keep": 4, "balance": 0}}},
        {"layers": []},
        {"layers": [{"layer": 0}]},
        {"layers": [{"groups": {"experts": {}}}]},
    ],
    ids=repr,
)
def test_a_damaged_description_is_refused(about: dict[str, Any], copy: Path) -> None:
    path = copy / "sensitivity" / "1-prune" / "importance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **about} if about else {}))
    with pytest.raises(UserError, match=r"importance.json: not what a prune step writes"):
        load_sensitivity(copy)


@pytest.mark.parametrize("name", ["importance.json", "importance.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_missing_and_cut_off_files_are_refused(name: str, content: bytes | None, copy: Path) -> None:
    path = copy / "sensitivity" / "1-prune" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_sensitivity(copy)


def test_nothing_cut_is_said() -> None:
    groups = {"heads": {"units": 8, "keep": 8, "balance": 4}, "ffn": {"units": 96, "keep": 96, "balance": 96}}
    about = {"criterion": "wanda", "groups": groups, "layers": [{"layer": 0, "groups": {}}]}
    found = Sensitivity("1-prune", about, {}, {}, {})
    assert found.groups == () and len(found.layers()) == 0 and "removed" in found.layers()
    with pytest.raises(UserError, match="1-prune cut nothing"):
        found.plot_cut()
    with pytest.raises(UserError, match="no scores of 'ffn'; it cut nothing"):
        found.curve("ffn")
