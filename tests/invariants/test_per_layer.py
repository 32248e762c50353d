"""Layers that differ in width, through the front door: stock transformers with our file of code computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import dynamic_module_utils

from compress.arch import FAMILIES, family_of
from compress.card import auto_class
from compress.checkpoint.headers import read_header
from compress.checkpoint.layout import files_bytes
from compress.checkpoint.ledger import Ledger
from compress.checkpoint.per_layer import FILE, KEY, source
from compress.checkpoint.reader import Reader
from compress.data import DataSpec
from compress.errors import UserError
from compress.formats import open_stream
from compress.inspect import inspect_model
from compress.machine import Machine
from compress.plan import make_plan
from compress.receipt import load_receipt
from compress.recipe import Recipe, loads
from compress.run import run
from compress.sensitivity import load_sensitivity
from compress.steps.evaluate.run import evaluate
from compress.steps.prune.options import PruneOptions
from tests import tiny
from tests.faults.test_resume import interrupt
from tests.invariants.test_prune import masked_weights
from tests.stock import load, logits

DATA = DataSpec(source="builtin", samples=4, length=32)
PINNED = {"layers.0.mlp": 40, "layers.1.self_attn": 4}
# pico model -> the class of the result, where heads differ by layer
MADE = {
    "llama": "PerLayerLlamaForCausalLM",
    "mistral": "PerLayerMistralForCausalLM",
    "qwen2": "PerLayerQwen2ForCausalLM",
    "qwen3": "PerLayerQwen3ForCausalLM",
    "smollm3": "PerLayerSmolLM3ForCausalLM",
    "glm": "PerLayerGlmForCausalLM",
    "glm4": "PerLayerGlm4ForCausalLM",
    "phi3": "PerLayerPhi3ForCausalLM",
    "glm4v": "PerLayerGlm46VForConditionalGeneration",
    "glm46v": "PerLayerGlm46VForConditionalGeneration",
    "gemma3_text": "PerLayerGemma3ForCausalLM",
    "qwen3_vl": "PerLayerQwen3VLForConditionalGeneration",
    "glm46v_interleaved": "PerLayerGlm46VForConditionalGeneration",
}


def prune(model: Path, out: Path, **options: object) -> Path:
    recipe = Recipe.single("prune", str(model), PruneOptions(**options), data=DATA)
    return run(recipe, out, Machine(1)).out


def trusted(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder as a user loads it: the Auto class with trust_remote_code=True, which runs the folder's own file."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    kind = getattr(transformers, auto_class(json.loads((folder / "config.json").read_text())))
    model, info = kind.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def inputs_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    given = [{"input_ids": torch.arange(40)[None]}]
    return [*given, tiny.image_inputs()] if "vision_config" in read_header(folder).config else given


@pytest.mark.parametrize("family", MADE)
def test_transformers_computes_what_was_streamed_and_generates(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prune(getattr(tiny, family)(tmp_path / "source"), tmp_path / "out", pin=PINNED, refit=False)
    header = read_header(out)
    layers = family_of(header).layers(header)
    assert [layers[0].ffn, layers[1].heads] == [40, 4] and layers[1].ffn > 40 and layers[0].heads > 4
    assert header.config["architectures"] == [MADE[family]]
    model = trusted(out, tmp_path / "modules", monkeypatch)
    assert type(model).__name__ == MADE[family]
    ids = torch.arange(40)[None]
    with Reader(out) as reader:
        streamed = open_stream(reader, torch.float32).logits(ids)
    assert torch.equal(logits(model, {"input_ids": ids}), streamed)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 257}
    cached = model.generate(ids, use_cache=True, **greedy)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **greedy)) and cached.shape[1] > 40
    # cutting is masking, with images too
    masked = load(tmp_path / "source")
    masked.load_state_dict(masked_weights(tmp_path / "source", out), strict=False)
    for given in inputs_of(tmp_path / "source"):
        torch.testing.assert_close(logits(model, given), logits(masked, given), rtol=1e-5, atol=1e-5)


def test_a_glm4v_keeps_its_label_where_only_the_ffn_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = prune(tiny.glm4v(tmp_path / "source"), tmp_path / "out", pin={"layers.1.mlp": 41})
    assert read_header(out).config["architectures"] == ["PerLayerGlm4vForConditionalGeneration"]
    model = trusted(out, tmp_path / "modules", monkeypatch)
    assert [layer.mlp.down_proj.in_features for layer in model.get_decoder().layers] == [128, 41]


def test_without_trust_stock_transformers_fails_loudly(tmp_path: Path) -> None:
    out = prune(tiny.llama(tmp_path / "source"), tmp_path / "out", pin=PINNED, refit=False)
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True)


def test_the_result_says_so_and_planned_is_written(tmp_path: Path) -> None:
    source_folder = tiny.llama(tmp_path / "source")
    out = prune(source_folder, tmp_path / "out", ratio=0.3, protect=["layers.2.*"], pin={"layers.1.self_attn": 6})
    receipt = load_receipt(out)
    step = receipt["steps"][0]
    assert step["trust_remote_code"] is True and step["model_type"] == "mistral"  # 6 heads do not divide 64
    assert step["keep"]["heads"] == [8, 6, 8] and step["keep"]["ffn"][2] == 96
    assert step["keep"]["ffn"][0] == step["keep"]["ffn"][1] < 96 * 0.7
    assert any("trust_remote_code" in note for note in step["notes"])
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == step["bytes"]
    assert abs(step["removed"] - 0.3) < 0.02
    assert (out / FILE).is_file()
    found = inspect_model(str(out))
    assert found["trust_remote_code"] is True
    assert [group["units_per_layer"] for group in found["groups"]] == [[8, 6, 8], step["keep"]["ffn"]]
    assert all("trust_remote_code" in " ".join(cut["loaded_by"]) for cut in found["cuts"])
    assert {cut["option"] for cut in found["cuts"]} == {"keep_heads", "keep_ffn"}  # layers that differ are not dropped


CHAIN = """
model: {model}
steps:
  - prune: {{pin: {{layers.0.mlp: 40}}, protect: [layers.2], ffn: 0.25}}
  - distill: {{max_steps: 2, batch: 2}}
  - prune: {{heads: 0.5, ffn: 0.2}}
  - quantize: {{format: {format}}}
keep_intermediate: false
evaluate: last
data:
  calibration: {{samples: 4, length: 32}}
  training: {{samples: 4, length: 32}}
  evaluation: {{samples: 4, length: 32}}
"""


@pytest.mark.parametrize("format", ["int8", "w8a8"])
def test_it_is_distilled_pruned_again_quantized_and_evaluated(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llama(tmp_path / "source", dtype=torch.bfloat16)
    recipe = loads(CHAIN.format(model=model, format=format))
    out = run(recipe, tmp_path / "out", Machine(1)).out
    header = read_header(out)
    layers = family_of(header).layers(header)
    assert [(each.heads, each.ffn) for each in layers] == [(4, 32), (4, 56), (4, 80)]
    assert load_receipt(out)["stages"][-1]["kl"] > 0
    assert files_bytes(header.tensors.values()) == header.stored_bytes()
    again = evaluate(out, DATA, Machine(1))
    assert again["perplexity"] > 1
    if format == "w8a8":
        assert trusted(out, tmp_path / "modules", monkeypatch).generate(torch.arange(9)[None], max_new_tokens=3).numel()


def test_cut_to_one_width_it_is_a_stock_checkpoint_again(tmp_path: Path) -> None:
    first = prune(tiny.llama(tmp_path / "source"), tmp_path / "first", pin={"layers.1.mlp": 40}, refit=False)
    out = prune(first, tmp_path / "out", keep_ffn=40, refit=False)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["intermediate_size"] == 40
    assert KEY not in config and "auto_map" not in config and not (out / FILE).exists()
    load(out)


def test_no_code_runs_but_our_own(tmp_path: Path) -> None:
    out = prune(tiny.llama(tmp_path / "source"), tmp_path / "out", pin=PINNED, refit=False)
    assert (out / FILE).read_text() == source("LlamaForCausalLM")
    mark = tmp_path / "ran"
    evil = f"open({str(mark)!r}, 'w').write('x')\n" + source("LlamaForCausalLM")
    recipe = Recipe.single("prune", str(out), PruneOptions(ffn=0.3), data=DATA)
    for content, words in ((evil, "not the code that autoglm-compress writes"), (None, "missing")):
        (out / FILE).unlink() if content is None else (out / FILE).write_text(content)
        with pytest.raises(UserError, match=words):
            make_plan(recipe, Machine(1), check_machine=False)
    assert not mark.exists()
    (out / FILE).write_text(source("LlamaForCausalLM"))
    config = json.loads((out / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "elsewhere.Model"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="auto_map"):
        make_plan(recipe, Machine(1), check_machine=False)
    del config["auto_map"]  # as of a family of transformers itself whose layers differ
    (out / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match="per_layer_config is not of this program"):
        make_plan(recipe, Machine(1), check_machine=False)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"7": {"intermediate_size": 40}}, "'7' is no layer, allowed: 0 to 2"),
        ({"1": {"intermediate_sizes": 40}}, "did you mean 'intermediate_size'"),
        ({"1": {"intermediate_size": 0}}, "must be a positive whole number, found 0"),
        ({"1": {"num_attention_heads": 3}}, "3 attention heads do not divide into 2 KV heads"),
        ({"1": {"intermediate_size": 48}}, "config.json implies"),
        ([], "must be an object"),
    ],
)
def test_what_config_says_of_layers_is_checked(said: object, words: str, tmp_path: Path) -> None:
    out = prune(tiny.llama(tmp_path / "source"), tmp_path / "out", pin={"layers.1.mlp": 40}, refit=False)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, KEY: said}))
    recipe = Recipe.single("prune", str(out), PruneOptions(ffn=0.3), data=DATA)
    with pytest.raises(UserError, match=words):
        make_plan(recipe, Machine(1), check_machine=False)


def test_every_family_is_shown_here_or_refuses(tmp_path: Path) -> None:
    assert {name for name, family in FAMILIES.items() if family.layered} == set(MADE)
    recipe = Recipe.single("prune", str(tiny.glm4v(tmp_path / "m")), PruneOptions(pin=PINNED, flavour="native"))
    with pytest.raises(UserError, match=r"prune\.pin: layers of a glm4v_native cannot differ in width"):
        make_plan(recipe, Machine(1), check_machine=False)
    recipe = Recipe.single("prune", str(tiny.qwen2_5_vl(tmp_path / "q")), PruneOptions(ffn=0.3, protect=["layers.1"]))
    with pytest.raises(UserError, match=r"prune\.protect: layers of a qwen2_5_vl cannot differ in width"):
        make_plan(recipe, Machine(1), check_machine=False)


def test_its_scores_are_read_back(tmp_path: Path) -> None:
    out = prune(tiny.llama(tmp_path / "source"), tmp_path / "out", ratio=0.3, protect=["layers.2"], pin=PINNED)
    found = load_sensitivity(out)
    keep = load_receipt(out)["steps"][0]["keep"]
    rows = found.layers().set_index(["layer", "group"])
    assert sorted(rows.index) == [(0, "ffn"), (1, "ffn"), (1, "heads")]
    assert rows.kept.to_dict() == {(0, "ffn"): 40, (1, "ffn"): keep["ffn"][1], (1, "heads"): 4}
    assert found.plot_cut().axes and found.plot_curves("ffn").axes and found.plot_heads().axes


FUSED = """
model: {model}
steps:
  - prune: {{ratio: 0.3, protect: [layers.1.mlp], pin: {{layers.2.self_attn: 6}}}}
  - quantize: {{format: w8a16}}
keep_intermediate: false
evaluate: never
data: {{calibration: {{samples: 4, length: 32}}}}
"""


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = loads(FUSED.format(model=tiny.llama(tmp_path / "source")))
    whole = run(recipe, tmp_path / "whole", Machine(1)).out
    with monkeypatch.context() as patched:
        calls = interrupt(patched, Ledger, "save", 2)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out", Machine(1), checkpoint_every=0)
        assert calls() == 2
    out = run(recipe, tmp_path / "out", Machine(1), checkpoint_every=0).out
    for name in ("model.safetensors", "config.json", "receipt.json", FILE):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
