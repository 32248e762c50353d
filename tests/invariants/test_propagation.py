"""Error propagation through the front door: refits aimed at what the dense model gave, behind layers already pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint.ledger import Ledger
from compress.cli import main
from compress.data import windows
from compress.errors import UserError
from tests import tiny
from tests.faults.test_resume import interrupt
from tests.invariants.test_joint_refit import errors
from tests.invariants.test_prune import DATA, prune
from tests.stock import load

CUT: dict[str, Any] = {"keep_ffn": 40, "criterion": "magnitude"}
DOWN = "model.layers.{}.mlp.down_proj.weight"


def caught(model: Any, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What down_proj of a layer reads and gives, and what the layer gives, [T, n], [T, d], [T, d]; in stock
    transformers, in double precision."""
    found: list[torch.Tensor] = []
    module = model.model.layers[layer]

    def keep(module: Any, args: Any, out: Any) -> None:
        found.extend(each.detach().flatten(0, -2).double() for each in (args[0], out))

    def whole(module: Any, args: Any, out: Any) -> None:
        found.append((out if isinstance(out, torch.Tensor) else out[0]).detach().flatten(0, -2).double())

    handles = [module.mlp.down_proj.register_forward_hook(keep), module.register_forward_hook(whole)]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    read, gave, through = found
    return read, gave, through


@pytest.mark.parametrize(
    ("share", "depth", "stay"),
    [(0.3, {}, [0, 1, 2, 3]), (1.0, {}, [0, 1, 2, 3]), (0.5, {"keep_layers": 2, "layer_criterion": "loss"}, [1, 3])],
)
def test_down_proj_is_the_ridge_solution_for_the_shifted_outputs(
    share: float, depth: dict[str, Any], stay: list[int], tmp_path: Path
) -> None:
    """Also behind layers that went: they are passed in the dense model, and what they did is wanted as well."""
    source = tiny.llama(tmp_path / "source", num_hidden_layers=4)
    out = prune(source, tmp_path / "out", **CUT, **depth, error_propagation=share)
    ids = torch.from_numpy(windows(DATA, "calibration", source, 0).ids)
    dense, pruned = load(source), load(out)
    chosen = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    assert [layer for layer, each in enumerate(errors(out)) if each] == stay
    for place, layer in enumerate(stay):
        behind = load(source)  # the whole layer, behind layers that were cut
        behind.model.layers = torch.nn.ModuleList([*pruned.model.layers[:place], behind.model.layers[layer]])
        behind.config.num_hidden_layers = place + 1
        behind.model.layers[place].self_attn.layer_idx = place
        read, gave, through = caught(behind, place, ids)
        wanted = gave + share * (caught(dense, layer, ids)[2] - through)
        keep = chosen[f"layers.{layer}.ffn.keep"].long()
        h = (read.T @ read / len(read)).numpy()
        ridge = 0.01 * h.diagonal().mean() * np.eye(len(keep))
        weight = dense.model.layers[layer].mlp.down_proj.weight.detach().double().numpy()[:, keep]
        product = (wanted.T @ read[:, keep] / len(read)).numpy()
        expected = (product + weight @ ridge) @ np.linalg.inv(h[keep][:, keep] + ridge)
        found = pruned.model.layers[place].mlp.down_proj.weight.detach().double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
        off = wanted.numpy() - read[:, keep].numpy() @ expected.T
        error = (off**2).sum() / (wanted.numpy() ** 2).sum()
        assert errors(out)[layer]["ffn"]["error"] == pytest.approx(error, rel=1e-3)


def test_the_first_layer_is_as_without_and_the_others_are_not(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    one, other = prune(source, tmp_path / "a", **CUT), prune(source, tmp_path / "b", **CUT, error_propagation=0.3)
    before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {DOWN.format(1), DOWN.format(2)}
    assert errors(one)[0]["ffn"]["error"] == errors(other)[0]["ffn"]["error"]


@pytest.mark.parametrize("family", ["phi3", "qwen2_5_vl", "gemma3_text", "glm4v"])
def test_the_whole_model_comes_nearer_to_the_dense_one(family: str, tmp_path: Path) -> None:
    """What a stock model gives behind its last layer, on the calibration text."""
    source = getattr(tiny, family)(tmp_path / "source")
    ids = torch.from_numpy(windows(DATA, "calibration", source, 0).ids)

    def last(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = load(folder)(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return found

    wanted = last(source)
    apart = [
        float((last(prune(source, tmp_path / f"{share}", **CUT, error_propagation=share)) - wanted).square().sum())
        for share in (0.0, 0.5)
    ]
    assert apart[1] < apart[0]


def test_the_joint_refit_has_the_same_aim(tmp_path: Path) -> None:
    """Behind a layer that lost heads alone, so that both begin with the same: the error by another way."""
    source = tiny.llama(tmp_path / "source")
    cut = CUT | {"keep_heads": 4, "protect": "layers.0.mlp", "token_weights": "norm", "error_propagation": 0.5}
    alone, both = prune(source, tmp_path / "a", **cut), prune(source, tmp_path / "b", **cut, joint_refit=1)
    first = errors(alone)[1]["ffn"], errors(both)[1]["ffn"]
    assert first[1]["error_reader_alone"] == pytest.approx(first[0]["error"], rel=1e-3)
    assert first[1]["error"] < 0.98 * first[1]["error_reader_alone"]


def test_resumed_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.llama(tmp_path / "source")
    line = ["prune", str(source), "--keep-ffn", "40", "--keep-layers", "2", "--error-propagation", "0.5"]
    line += ["--samples", "6", "--length", "64", "--threads", "1", "--checkpoint-every", "0", "-q"]
    assert main([*line, "-o", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        interrupt(patched, Ledger, "save", 2)
        assert main([*line, "-o", str(tmp_path / "out")]) == 130
    assert main([*line, "-o", str(tmp_path / "out")]) == 0
    for name in ("model.safetensors", "receipt.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_ffn": 40, "refit": False}, "which refit: false leaves out"),
        ({"keep_heads": 4}, "no FFN neurons go"),
        ({"keep_ffn": 40, "held_out": 0.2}, "not with held_out"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        prune(tiny.llama(tmp_path / "source"), tmp_path / "out", error_propagation=0.3, **options)


def test_a_family_that_nobody_described_is_refused(tmp_path: Path) -> None:
    source = tiny.undescribed("starcoder2", tmp_path / "source", sliding_window=16)
    with pytest.raises(UserError, match="how a starcoder2 adds what its FFN gives to the residual stream is not descr"):
        prune(source, tmp_path / "out", ffn=0.3, error_propagation=0.3)
