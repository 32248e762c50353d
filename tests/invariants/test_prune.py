"""Properties of pruning, through the front door, for all families: what was cut is what was masked, no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.arch import FAMILIES, Group, family_of
from compress.checkpoint.headers import read_header
from compress.criteria import CRITERIA
from compress.data import DataSpec
from compress.errors import UserError
from compress.machine import Machine
from compress.recipe import Recipe
from compress.run import run
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.surgery import columns
from tests import tiny
from tests.stock import load, logits

CUTS = {  # name -> pico model, options, the label that stock transformers loads
    "llama-ffn": ("llama", {"ffn": 0.4}, "llama"),
    "llama-heads": ("llama", {"heads": 0.5}, "llama"),
    "llama-both": ("llama", {"ratio": 0.4, "heads": 0.5}, "llama"),
    "llama-heads-that-do-not-divide": ("llama", {"keep_heads": 6}, "mistral"),
    "llama-kv-drop": ("llama", {"keep_kv_heads": 1, "kv_merge": "drop", "keep_heads": 2}, "llama"),
    "phi3-kv-drop": ("phi3", {"keep_kv_heads": 1, "kv_merge": "drop"}, "phi3"),
    "glm4v-kv-drop": ("glm4v", {"keep_kv_heads": 1, "kv_merge": "drop", "keep_ffn": 41}, "glm46v"),
    "mistral-both": ("mistral", {"keep_heads": 4, "keep_ffn": 41}, "mistral"),
    "qwen2-both": ("qwen2", {"keep_heads": 6, "keep_ffn": 41}, "qwen2"),
    "qwen3-both": ("qwen3", {"keep_heads": 4, "keep_ffn": 41}, "qwen3"),
    "smollm3-both": ("smollm3", {"keep_heads": 6, "keep_ffn": 41}, "smollm3"),
    "gemma3-both": ("gemma3_text", {"keep_heads": 4, "keep_ffn": 41}, "gemma3_text"),
    "glm-both": ("glm", {"keep_heads": 4, "keep_ffn": 41}, "glm"),
    "glm4-both": ("glm4", {"keep_heads": 6, "keep_ffn": 41}, "glm4"),
    "phi3-both": ("phi3", {"keep_heads": 6, "keep_ffn": 41}, "phi3"),
    "qwen2_5_vl-ffn": ("qwen2_5_vl", {"keep_ffn": 41}, "qwen2_5_vl"),
    "qwen3_vl-both": ("qwen3_vl", {"keep_heads": 4, "keep_ffn": 41}, "qwen3_vl"),
    "glm4v-ffn": ("glm4v", {"ffn": 0.4}, "glm4v"),
    "glm4v-heads": ("glm4v", {"keep_heads": 6}, "glm46v"),
    "glm4v-both": ("glm4v", {"ratio": 0.4, "heads": 0.5}, "glm46v"),
    "glm46v-ffn": ("glm46v", {"keep_ffn": 77}, "glm46v"),
    "glm46v-heads": ("glm46v", {"keep_heads": 4}, "glm46v"),
    "glm46v-interleaved-ffn": ("glm46v_interleaved", {"ffn": 0.4}, "glm46v"),
    "glm46v-interleaved-both": ("glm46v_interleaved", {"keep_heads": 2, "keep_ffn": 100}, "glm46v"),
}
DATA = DataSpec(source="builtin", samples=6, length=64)


def prune(model: Path, out: Path, **options: object) -> Path:
    recipe = Recipe.single("prune", str(model), PruneOptions(**options), data=DATA)
    return run(recipe, out, Machine(1)).out


def mask(tensors: dict[str, torch.Tensor], group: Group, gone: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same layer at full size with the units `gone` silenced (reader columns zeroed): what a cut must equal."""
    new = dict(tensors)
    reader = f"{group.reader}.weight"
    new[reader] = tensors[reader].clone()
    new[reader][:, columns(gone, group.width)] = 0
    return new


def masked_weights(source: Path, out: Path) -> dict[str, torch.Tensor]:
    """The source's tensors with every unit silenced that `out` says it does not keep."""
    tensors = load_file(source / "model.safetensors")
    scores = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    header = read_header(source)
    family = family_of(header)
    sizes = family.sizes(header)
    for index in range(sizes.layers):
        prefix = family.prefix(index)
        layer = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for group in family.groups(sizes, header.text_config):
            if f"layers.{index}.{group.name}.keep" not in scores:
                continue
            keep = set(scores[f"layers.{index}.{group.name}.keep"].tolist())
            gone = torch.tensor([unit for unit in range(group.units) if unit not in keep])
            assert len(gone) and len(keep)
            layer = mask(layer, group, gone)
        tensors |= {prefix + name: value for name, value in layer.items()}
    return tensors


@pytest.mark.parametrize("cut", CUTS)
def test_cutting_is_masking(cut: str, tmp_path: Path) -> None:
    family, options, label = CUTS[cut]
    source = getattr(tiny, family)(tmp_path / "source")
    out = prune(source, tmp_path / "out", refit=False, **options)
    assert read_header(out).config["model_type"] == label
    masked = load(source)
    named = family_of(read_header(source)).parameter
    silenced = {named(name): value for name, value in masked_weights(source, out).items() if "visual" not in name}
    missing = masked.load_state_dict(silenced, strict=False)
    assert not missing.unexpected_keys
    inputs = [{"input_ids": torch.arange(40)[None]}]
    if "vision_config" in read_header(source).config:
        inputs.append(tiny.image_inputs())
    # in float64, where both are the same sums but for zeros: in float32 a GQA of another shape rounds in another order
    small, whole, masked = load(out).double(), load(source).double(), masked.double()
    for given in inputs:
        torch.testing.assert_close(logits(small, given), logits(masked, given), rtol=1e-5, atol=1e-5)
        # the units did something: without them the model is another one
        assert not torch.allclose(logits(masked, given), logits(whole, given), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_units_keeps_the_bytes(family: str, tmp_path: Path) -> None:
    source = getattr(tiny, family)(tmp_path / "source", dtype=torch.bfloat16)
    sizes = family_of(read_header(source)).sizes(read_header(source))
    out = prune(source, tmp_path / "out", keep_ffn=sizes.ffn, keep_heads=sizes.heads)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_refit_lowers_the_error_of_every_layer(criterion: str, tmp_path: Path) -> None:
    from compress.receipt import load_receipt

    source = tiny.llama(tmp_path / "source")
    out = prune(source, tmp_path / "out", ratio=0.4, heads=0.5, criterion=criterion)
    for layer in load_receipt(out)["steps"][0]["relative_output_error"]:
        assert set(layer) == {"heads", "ffn"}
        for errors in layer.values():
            assert 0 < errors["error"] < errors["error_without_refit"]


def test_each_refit_takes_the_damping_that_is_best_on_held_out_windows(tmp_path: Path) -> None:
    from compress.limits import DAMPINGS
    from compress.receipt import load_receipt

    source = tiny.llama(tmp_path / "source")
    out = prune(source, tmp_path / "out", ratio=0.4, heads=0.5, held_out=0.25)
    for layer in load_receipt(out)["steps"][0]["relative_output_error"]:
        for errors in layer.values():
            # the refit that is judged on other windows has not seen them
            assert errors["damping"] in DAMPINGS and errors["error"] < errors["error_held_out"] < 1


def test_no_window_held_back_is_refused_where_only_the_text_tells_how_many_there_are(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words that stand for a text. " * 20)
    source = tiny.llama(tmp_path / "source")
    data = DataSpec(source=str(text), length=64)  # all of it: a plan cannot count its windows
    recipe = Recipe.single("prune", str(source), PruneOptions(ffn=0.3, held_out=0.001), data=data)
    with pytest.raises(UserError, match=r"0\.001 of \d+ calibration windows is none, or all of them"):
        run(recipe, tmp_path / "out", Machine(1))
    assert not (tmp_path / "out").exists()


def test_heads_go_equally_from_every_kv_group(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    out = prune(source, tmp_path / "out", keep_heads=4)
    scores = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    for index in range(3):
        keep = scores[f"layers.{index}.heads.keep"]
        assert [int((keep // 4 == group).sum()) for group in range(2)] == [2, 2]


@pytest.mark.parametrize("options", [{"ffn": 0.5}, {"keep_heads": 4}, {"keep_heads": 4, "flavour": "native"}])
def test_vision_passes_through_byte_for_byte(options: dict[str, object], tmp_path: Path) -> None:
    vision_is_kept(tiny.glm4v(tmp_path / "source", dtype=torch.bfloat16), tmp_path, options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_vision_towers_pass_through_as_well(family: str, tmp_path: Path) -> None:
    vision_is_kept(getattr(tiny, family)(tmp_path / "source", dtype=torch.bfloat16), tmp_path, {"ffn": 0.5})


def vision_is_kept(source: Path, tmp_path: Path, options: dict[str, object]) -> None:
    out = prune(source, tmp_path / "out", **options)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    vision = [name for name in before if "visual." in name]
    assert len(vision) > 10
    for name in vision:
        assert torch.equal(before[name], after[name]), name


def test_sharded_and_unsharded_sources_give_the_same_weights(tmp_path: Path) -> None:
    whole = tiny.llama(tmp_path / "whole")
    shards = tiny.llama(tmp_path / "shards", shard="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    first = load_file(prune(whole, tmp_path / "a", ratio=0.3) / "model.safetensors")
    second = load_file(prune(shards, tmp_path / "b", ratio=0.3) / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wide_modules_solve_in_float32_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.solve

    source = tiny.llama(tmp_path / "source")
    double = load_file(prune(source, tmp_path / "a", ratio=0.3) / "model.safetensors")
    monkeypatch.setattr(compress.solve, "DOUBLE_UP_TO", 0)
    single = load_file(prune(source, tmp_path / "b", ratio=0.3) / "model.safetensors")
    for name, value in double.items():
        torch.testing.assert_close(single[name], value, rtol=5e-3, atol=5e-4)
