"""GLM-4.1V with fewer heads, through the front door: both flavours are the model that was meant, and steps go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Glm4vForConditionalGeneration
from transformers.models.glm4v import modeling_glm4v

import compress
from compress.arch import family_of
from compress.arch.rope import HALF_SPLIT, INTERLEAVED, arranged, row_orders
from compress.checkpoint.headers import read_header
from compress.cli import main
from compress.errors import UserError
from compress.receipt import load_receipt
from tests import tiny
from tests.invariants.test_prune import masked_weights, prune
from tests.stock import load, logits

TEXT = {"input_ids": torch.arange(40)[None]}
SIXTEEN: dict[str, Any] = {  # heads of 16, 8 of whose rows rotate: enough to tell any two orders apart
    "hidden_size": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    },
}


def video_inputs() -> dict[str, torch.Tensor]:
    """Two frames of 56 x 56 (4 x 4 patches each, merged to 4 tokens each) inside a prompt, for the glm4v pico model."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 250, (1, 24), generator=generator)
    frame = [301, *[tiny.IMAGE_TOKEN] * 4, 302]
    ids[0, 4:18] = torch.tensor([304, *frame, *frame, 305])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == tiny.IMAGE_TOKEN).long(),
        "pixel_values_videos": torch.randn(32, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


INPUTS = {"text": TEXT, "image": tiny.image_inputs(), "video": video_inputs()}


def masked_model(source: Path, out: Path) -> Any:
    """The source in stock transformers, with all units silenced that `out` does not keep."""
    model = load(source)
    assert not model.load_state_dict(masked_weights(source, out), strict=False).unexpected_keys
    return model


def reading_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock glm4v, but its attention takes head_dim from the config: what vLLM's own class does, and the oracle of the
    flavour native."""
    stock = modeling_glm4v.Glm4vTextAttention.__init__

    def init(self: Any, config: Any, layer_idx: int | None = None) -> None:
        stock(self, config, layer_idx)
        hidden, width = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        self.head_dim, self.scaling = width, width**-0.5
        self.q_proj = nn.Linear(hidden, queries, bias=True)
        self.k_proj = nn.Linear(hidden, keys, bias=True)
        self.v_proj = nn.Linear(hidden, keys, bias=True)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    monkeypatch.setattr(modeling_glm4v.Glm4vTextAttention, "__init__", init)


@pytest.mark.parametrize("keep", [{"keep_heads": 6}, {"keep_heads": 2, "keep_ffn": 77}])
def test_both_flavours_are_the_masked_model(
    keep: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.glm4v(tmp_path / "source", **SIXTEEN)
    portable = prune(source, tmp_path / "portable", refit=False, **keep)
    native = prune(source, tmp_path / "native", refit=False, flavour="native", **keep)
    masked, stock = masked_model(source, portable), load(portable)
    expected = {name: logits(masked, given) for name, given in INPUTS.items()}
    for name, given in INPUTS.items():
        torch.testing.assert_close(logits(stock, given), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        load(native)
    reading_head_dim(monkeypatch)
    for name, given in INPUTS.items():
        torch.testing.assert_close(logits(load(native), given), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_flavours_differ_in_the_rotary_rows_alone(tmp_path: Path) -> None:
    source = tiny.glm4v(tmp_path / "source", dtype=torch.bfloat16, **SIXTEEN)
    options = {"keep_heads": 6, "keep_ffn": 96}
    portable = prune(source, tmp_path / "portable", **options)
    native = prune(source, tmp_path / "native", flavour="native", **options)
    ours, theirs = load_file(portable / "model.safetensors"), load_file(native / "model.safetensors")
    differ = {name.split("layers.")[1][2:] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differ == {f"self_attn.{linear}_proj.{kind}" for linear in "qk" for kind in ("weight", "bias")}
    for name in ours:
        if differ & {name.split("layers.")[-1][2:]}:  # heads of 16: rows 0, 2, 4, 6, 1, 3, 5, 7, then the rest
            order = [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]
            heads = theirs[name].view(-1, 16, *theirs[name].shape[1:])
            assert torch.equal(ours[name], heads[:, order].reshape(ours[name].shape)), name
    steps = [load_receipt(folder)["steps"][0] for folder in (portable, native)]
    assert [step["rope_layout"] for step in steps] == [HALF_SPLIT, INTERLEAVED]
    assert [step["stock_transformers"] for step in steps] == [True, False]
    assert steps[0]["self_check"]["streamed_logits"] == steps[1]["self_check"]["streamed_logits"] == "equal"
    said = " ".join(steps[1]["notes"])
    assert "stock transformers does not load this flavour" in said and "loaded by vLLM (its own class)" in said
    assert "Stock transformers does not load this folder" in (native / "README.md").read_text()
    assert "from_pretrained" in (portable / "README.md").read_text()
    with pytest.raises(UserError, match="the flavour native of glm4v is read by vLLM alone, and bnb-int8 by stock"):
        compress.quantize(native, tmp_path / "unread", format="int8")


def test_rows_in_the_wrong_order_load_silently_and_are_another_model(tmp_path: Path) -> None:
    """Why the layout stands in the receipt and logits are compared: shapes do not tell."""
    source = tiny.glm4v(tmp_path / "source", **SIXTEEN)
    out = prune(source, tmp_path / "out", keep_heads=6, refit=False)
    expected = logits(load(out), TEXT)
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())["text_config"]
    header = read_header(out)
    orders = row_orders(family_of(header).sizes(header), config, HALF_SPLIT, INTERLEAVED)
    wrong = {name: arranged(name.split(".", 4)[-1], value, orders) for name, value in tensors.items()}
    assert sum(not torch.equal(wrong[name], tensors[name]) for name in tensors) == 2 * 4
    save_file({name: value.contiguous() for name, value in wrong.items()}, out / "model.safetensors", {"format": "pt"})
    assert not torch.allclose(logits(load(out), TEXT), expected, rtol=1e-2, atol=1e-2)


def test_a_pruned_model_generates_what_the_masked_one_does(tmp_path: Path) -> None:
    source = tiny.glm4v(tmp_path / "source")
    out = prune(source, tmp_path / "out", keep_heads=6, keep_ffn=96, refit=False)
    small, masked = load(out), masked_model(source, out)
    for given in (TEXT, tiny.image_inputs()):
        said = [model.generate(**given, max_new_tokens=8, do_sample=False) for model in (small, masked)]
        assert torch.equal(*said) and said[0].shape[1] > given["input_ids"].shape[1]


def test_a_config_in_the_old_spelling_is_cut_as_well(tmp_path: Path) -> None:
    source = tiny.glm4v(tmp_path / "source", **SIXTEEN)
    path = source / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": 0.5, "head_dim": 16}
    text["rope_scaling"] = {"type": "default", "mrope_section": rope["mrope_section"]}
    for key in ("pad_token_id", "eos_token_id", "max_position_embeddings", "model_type"):
        del text[key]
    for inner in (config, config["vision_config"]):
        inner.pop("model_type", None)
    config["model_type"] = "glm4v"
    path.write_text(json.dumps(config))
    out = prune(source, tmp_path / "out", keep_heads=4, refit=False)
    masked, small = masked_model(source, out), load(out)
    for given in INPUTS.values():
        torch.testing.assert_close(logits(small, given), logits(masked, given), rtol=1e-5, atol=1e-5)


RECIPE = """
model: {model}
data:
  calibration: {{samples: 4, length: 64}}
  training: {{samples: 4, length: 64}}
  evaluation: {{samples: 2, length: 64}}
steps:
  - prune: {{keep_heads: 6}}
  - distill: {{max_steps: 1, batch: 2}}
  - prune: {{keep_heads: 4, keep_ffn: 96}}
  - quantize: {{format: int8}}
evaluate: each
"""


def test_every_step_goes_on_with_the_portable_flavour(tmp_path: Path) -> None:
    source = tiny.glm4v(tmp_path / "source")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=source))
    out = tmp_path / "out"
    assert main(["run", str(recipe), "-o", str(out), "--threads", "1", "-q"]) == 0
    stages = load_receipt(out)["stages"]
    assert [row["stage"] for row in stages] == ["dense", "1-prune", "2-distill", "3-prune", "4-quantize"]
    model = load(out)
    assert type(model).__name__ == "Glm46VForConditionalGeneration"
    text = model.config.get_text_config()
    assert (text.num_attention_heads, text.head_dim, text.intermediate_size) == (4, 8, 96)


@pytest.mark.parametrize(("model", "flavour"), [("glm4v", "portable"), ("glm4v", "native"), ("llama", "portable")])
def test_commands_one_by_one(model: str, flavour: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, small, coded = getattr(tiny, model)(tmp_path / "source"), tmp_path / "small", tmp_path / "coded"
    text = ["--samples", "4", "--length", "64", "--threads", "1", "-q"]
    heads = ["--keep-heads", "6", "--flavour", flavour]
    assert main(["prune", str(source), "-o", str(small), *heads, *text]) == 0
    assert ("from_pretrained" in capsys.readouterr().out) == (flavour == "portable")
    label = {"native": "glm4v", "portable": "glm46v" if model == "glm4v" else "mistral"}[flavour]
    assert read_header(small).config["model_type"] == label
    assert main(["quantize", str(small), "-o", str(coded), "--format", "w8a16", "--threads", "1", "-q"]) == 0
    capsys.readouterr()
    found = []
    for folder in (small, coded):
        assert main(["evaluate", str(folder), "--reference", str(source), "--json", *text]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["parameters"] == found[1]["parameters"] and found[1]["bytes"] < found[0]["bytes"]
    assert 0 < found[0]["kl"] < 5
    assert found[1]["perplexity"] == pytest.approx(found[0]["perplexity"], rel=0.02)


def test_the_native_flavour_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, other = tiny.glm4v_native(tmp_path / "native"), tiny.glm4v(tmp_path / "other")
    out = tmp_path / "out"
    assert main(["distill", str(native), "--teacher", str(other), "-o", str(out)]) == 2
    assert "does not load the flavour native" in capsys.readouterr().err
    assert main(["distill", str(other), "--teacher", str(native), "-o", str(out)]) == 2
    assert "does not load a teacher of the flavour native" in capsys.readouterr().err


def test_a_native_folder_is_cut_again_and_made_portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.glm4v_native(tmp_path / "source", **SIXTEEN, head_dim=16)
    cuts = {
        "ffn": {"keep_ffn": 77},
        "native": {"keep_heads": 4, "flavour": "native"},
        "portable": {"keep_heads": 4},
    }
    made = {name: prune(source, tmp_path / name, refit=False, **options) for name, options in cuts.items()}
    portable = logits(load(made["portable"]), tiny.image_inputs())
    reading_head_dim(monkeypatch)
    for name, out in made.items():
        small = portable if name == "portable" else logits(load(out), tiny.image_inputs())
        expected = logits(masked_model(source, out), tiny.image_inputs())
        torch.testing.assert_close(small, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert isinstance(load(made["native"]), Glm4vForConditionalGeneration)


def test_the_tokenizer_of_a_relabelled_folder_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny.glm4v(tmp_path / "source")
    out = prune(source, tmp_path / "out", keep_heads=6)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, source))
    assert ours("as it was").input_ids == theirs("as it was").input_ids
    assert type(ours) is type(theirs)
