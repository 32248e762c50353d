"""The joint refit through the front door, for every family: it begins where the refit of down_proj ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.arch import FAMILIES
from compress.errors import UserError
from compress.receipt import load_receipt
from tests import tiny
from tests.invariants.test_prune import prune


def errors(out: Path) -> list[dict[str, dict[str, float]]]:
    found: list[dict[str, dict[str, float]]] = load_receipt(out)["steps"][0]["relative_output_error"]
    return found


def with_biases(folder: Path) -> Path:
    return tiny.llama(folder, mlp_bias=True)


MODELS = {**{family: getattr(tiny, family) for family in FAMILIES}, "llama with biases": with_biases}


@pytest.mark.parametrize("model", MODELS)
def test_it_begins_at_the_refit_and_lowers_the_error(model: str, tmp_path: Path) -> None:
    source = MODELS[model](tmp_path / "source")
    cut = {"keep_ffn": 64}
    alone, both = prune(source, tmp_path / "a", **cut), prune(source, tmp_path / "b", **cut, joint_refit=1)
    first = errors(alone)[0]["ffn"], errors(both)[0]["ffn"]
    assert "error_reader_alone" not in first[0]
    # the same number by another way: from the Gram matrix, and from the outputs that the stock layer gave
    assert first[1]["error_reader_alone"] == pytest.approx(first[0]["error"], rel=1e-3)
    for layer in errors(both):
        assert layer["ffn"]["error"] < 0.98 * layer["ffn"]["error_reader_alone"]
    before, after = load_file(alone / "model.safetensors"), load_file(both / "model.safetensors")
    changed = {name.rpartition("layers.0.")[2] for name in before if not torch.equal(before[name], after[name])}
    first_layer = {name for name in changed if name.startswith("mlp.")}
    gate = {"mlp.gate_up_proj.weight"} & set(changed) or {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
    assert first_layer == {*gate, "mlp.down_proj.weight"}


def test_the_activation_is_the_stock_layers_own(tmp_path: Path) -> None:
    """Keys of other families may stand in a config.json: a stock llama reads hidden_act alone."""
    source, cut = tiny.llama(tmp_path / "source"), {"keep_ffn": 64, "joint_refit": 1}
    without = errors(prune(source, tmp_path / "a", **cut))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_activation": "relu"}))
    assert errors(prune(source, tmp_path / "b", **cut)) == without


def test_with_heads_held_out_windows_and_widths_that_differ(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    cut = {"keep_heads": 4, "keep_ffn": 60, "pin": {"layers.1.mlp": 50}, "joint_refit": 2, "held_out": 0.2}
    out = prune(source, tmp_path / "out", **cut)
    again = prune(source, tmp_path / "again", **cut)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    for layer in errors(out):
        assert layer["ffn"]["error"] < layer["ffn"]["error_reader_alone"]
        assert "error_reader_alone" not in layer["heads"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ffn": 0.3, "refit": False}, "a joint refit goes on from the refit, which refit: false leaves out"),
        ({"keep_heads": 4}, "no FFN neurons go, so there is nothing to refit jointly"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        prune(tiny.llama(tmp_path / "source"), tmp_path / "out", joint_refit=1, **options)


def test_a_family_that_nobody_described_is_refused(tmp_path: Path) -> None:
    source = tiny.undescribed("starcoder2", tmp_path / "source", sliding_window=16)
    with pytest.raises(UserError, match="are gate, up and down is not described"):
        prune(source, tmp_path / "out", ffn=0.3, joint_refit=1)
