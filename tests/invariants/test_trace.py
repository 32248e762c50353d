"""Families that nobody described, through the front door: found, proved, cut, quantized, evaluated; or refused.

Described families are traced as well, and must come out as they were described.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.arch import FAMILIES, Family, described, family_of
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.reader import Reader
from compress.data import DataSpec
from compress.errors import UserError
from compress.formats import open_stream
from compress.machine import Machine
from compress.recipe import Recipe, loads
from compress.run import run
from compress.steps.prune.options import PruneOptions
from compress.stream.forward import Stream
from compress.trace import Unproved, _traced, find, prove, small
from compress.trace.family import family_of_found
from tests import tiny
from tests.invariants.test_prune import masked_weights
from tests.stock import load, logits

DATA = DataSpec(source="builtin", samples=4, length=48)
MODELS: dict[str, dict[str, Any]] = {  # each shows something that no described family has
    "starcoder2": {"sliding_window": 16},  # no gate; biases; LayerNorm
    "olmo2": {},  # a norm over all query heads: they stay
    "cohere": {"logit_scale": 0.5},  # attention and FFN beside each other; scaled logits
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "nemotron": {},  # no gate, other norms
    "phi": {"num_key_value_heads": 8},  # a bias of the output matrix; every head has a KV head
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "sliding_window": 16},
    "ctrl": {"dff": 96, "num_key_value_heads": 8},  # its own names for the keys of its config, and for its layers: h
}
HEADS = {"starcoder2", "cohere", "granite", "nemotron", "gemma2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("traced")
    return {kind: tiny.undescribed(kind, folder / kind, **sizes) for kind, sizes in MODELS.items()}


def prune(model: Path, out: Path, **options: Any) -> Path:
    return run(Recipe.single("prune", str(model), PruneOptions(**options), data=DATA), out, Machine(1)).out


@pytest.mark.parametrize("kind", MODELS)
def test_cutting_is_masking(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    source, options = models[kind], {"keep_ffn": 41} | ({"keep_heads": 4} if kind in HEADS else {})
    family = family_of(read_header(source))
    assert family.traced and family.name == kind
    out = prune(source, tmp_path / "out", refit=False, **options)
    masked, whole = load(source), load(source)
    masked.load_state_dict(masked_weights(source, out), strict=False)
    given = {"input_ids": torch.arange(40)[None]}
    torch.testing.assert_close(logits(load(out), given), logits(masked, given), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(masked, given), logits(whole, given), rtol=1e-2, atol=1e-2)
    with Reader(out) as reader:
        streamed = Stream(reader, family_of(reader.header), dtype=torch.float32).logits(given["input_ids"])
    torch.testing.assert_close(streamed, logits(load(out), given), rtol=1e-5, atol=1e-5)


def test_a_config_is_written_in_the_names_of_its_family(models: dict[str, Path], tmp_path: Path) -> None:
    header = read_header(prune(models["ctrl"], tmp_path / "out", keep_ffn=41, keep_layers=2, refit=False))
    assert (header.config["dff"], header.config["n_layer"]) == (41, 2)
    assert family_of(header).sizes(header).ffn == 41


def test_lists_by_layer_are_told_apart_by_the_depth_that_the_family_names(models: dict[str, Path]) -> None:
    header = read_header(models["ctrl"])
    family, kinds = family_of(header), {"kinds": ["a", "b", "b"]}
    assert "num_hidden_layers" not in header.config
    assert family.with_lists(header, header.config | kinds).config["kinds"] == ["a", "b", "b"]
    assert family.with_lists(header, {**header.config, "n_layer": 2, **kinds}) == header


@pytest.mark.parametrize("criterion", ["tp-magnitude", "tp-taylor"])
def test_torch_pruning_finds_layers_under_their_own_name(
    criterion: str, models: dict[str, Path], tmp_path: Path
) -> None:
    prune(models["ctrl"], tmp_path / "out", keep_ffn=41, criterion=criterion)


def test_layers_of_their_own_widths_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prune\.protect: layers of a ctrl cannot differ in width"):
        prune(models["ctrl"], tmp_path / "out", ffn=0.4, protect=["layers.0"])


def test_keeping_all_units_keeps_the_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    source = models["starcoder2"]
    out = prune(source, tmp_path / "out", keep_ffn=96, keep_heads=8)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize(("how", "kind"), [("w8a16", "granite"), ("bnb-int8", "phi"), ("w8a8", "gemma2")])
def test_quantize_and_evaluate_work_through_the_same_data(
    how: str, kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Scaled, biased and capped logits: the self-check of each step compares them with the stock model's."""
    recipe = loads(
        f"model: {models[kind]}\nevaluate: last\ndata:\n"
        "  evaluation: {source: builtin, samples: 2, length: 48}\n"
        "  calibration: {source: builtin, samples: 4, length: 48}\n"
        f"steps:\n  - prune: {{keep_ffn: 88}}\n  - quantize: {{format: {how}}}\n"
    )
    out = run(recipe, tmp_path / "out", Machine(1)).out
    given = {"input_ids": torch.arange(40)[None]}
    with Reader(out) as reader:
        streamed = open_stream(reader, torch.float32).logits(given["input_ids"])
    apart = float((streamed - logits(load(out), given)).abs().max() / streamed.std())
    assert apart < (0.2 if how == "bnb-int8" else 1e-3)  # bitsandbytes computes in float16


def test_inspect_says_that_it_was_traced(models: dict[str, Path]) -> None:
    found = compress.inspect(models["olmo2"])
    assert found["traced"] is True and found["loaded_by"] == ["stock transformers (Olmo2ForCausalLM)"]
    assert [cut["option"] for cut in found["cuts"]] == ["keep_ffn", "keep_layers"]
    shown = compress.inspect(models["nemotron"])
    kept = {cut["option"]: cut["keep"] for cut in shown["cuts"]}
    assert kept == {"keep_heads": [2, 4, 6], "keep_ffn": None, "keep_layers": [1, 2]}


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("starcoder3", {}, "model_type 'starcoder3' is not supported"),
        ("mamba", {"architectures": ["MambaForCausalLM"]}, "a matrix that is no nn.Linear, mixer.A_log"),
        ("qwen3_moe", {"architectures": ["Qwen3MoeForCausalLM"]}, "a tensor of 3 axes, mlp.experts."),
        ("bert", {"architectures": ["BertModel"]}, "BertModel is not the causal language model of its model_type"),
        ("olmo2", {"architectures": ["LlamaForCausalLM"]}, "which is Olmo2ForCausalLM"),
        ("olmo2", {"architectures": ["Olmo2ForCausalLM"], "hidden_size": "wide"}, "stock transformers refuses it"),
    ],
)
def test_what_cannot_be_proved_is_one_line(kind: str, changes: dict[str, Any], line: str) -> None:
    sizes = {key: value for key, value in tiny.LLAMA.items() if key != "head_dim"}
    with pytest.raises(UserError) as caught:
        described({"model_type": kind, **sizes, **changes})
    assert line in caught.value.message and "\n" not in caught.value.message


def test_heads_that_the_proof_does_not_hold_for_are_refused_in_a_plan(models: dict[str, Path], tmp_path: Path) -> None:
    for kind, why in (("olmo2", "the cut model is not the masked one"), ("phi", "has a KV head of its own")):
        header = read_header(models[kind])
        family = family_of(header)
        said = family.refuse(replace(family.sizes(header), heads=4), header.config)
        assert said is not None and said.startswith(f"query heads of this {kind} cannot be cut") and why in said
    with pytest.raises(UserError, match="KV heads of a granite are not merged"):
        prune(models["granite"], tmp_path / "merged", keep_kv_heads=1)
    with pytest.raises(UserError, match="query heads of this olmo2 cannot be cut"):
        prune(models["olmo2"], tmp_path / "out", keep_heads=4)


# The proof finds what is wrong.


def little(kind: str, models: dict[str, Path]) -> tuple[find.Found, dict[str, Any]]:
    config = small.smaller(read_header(models[kind]).config)
    return find.find(small.instance(config), config), config


def test_a_forgotten_tensor_is_found(models: dict[str, Path]) -> None:
    found, config = little("starcoder2", models)
    assert prove.prove(found, config) == found
    with pytest.raises(Unproved, match="its FFN neurons cannot be cut"):
        prove.prove(replace(found, ffn_cuts=found.ffn_cuts[:-1]), config)
    assert prove.prove(replace(found, head_cuts=found.head_cuts[:-1]), config).no_heads is not None


def test_rows_of_other_units_are_found(models: dict[str, Path]) -> None:
    found, config = little("granite", models)
    moved = tuple(replace(cut, width=2) if cut.axis == 0 else cut for cut in found.head_cuts)
    assert prove.prove(replace(found, head_cuts=moved), config).no_heads is not None


def test_a_model_that_mixes_its_layers_is_found(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.olmo2.modeling_olmo2 import Olmo2Model

    found, config = little("olmo2", models)
    whole = Olmo2Model.forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = whole(self, *args, **kwargs)
        if self.layers[0].mlp.down_proj.weight.is_meta:
            return out
        out.last_hidden_state = out.last_hidden_state + self.embed_tokens.weight.mean()
        return out

    monkeypatch.setattr(Olmo2Model, "forward", twice)
    with pytest.raises(Unproved, match="run one by one, give other logits"):
        prove.prove(found, config)


# Described families, traced: torch-pruning finds what was written down.

TEXT = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "glm", "glm4", "phi3"]


@pytest.mark.parametrize("name", TEXT)
def test_a_described_family_is_found_as_it_was_described(name: str, tmp_path: Path) -> None:
    header = read_header(getattr(tiny, name)(tmp_path / "model", num_hidden_layers=2, **_uniform(name)))
    family, traced = FAMILIES[name], _traced(json.dumps(dict(header.config), sort_keys=True))
    sizes = family.sizes(header)
    assert traced.sizes(header) == sizes
    assert (traced.text, traced.head, traced.parts, traced.architecture) == (
        family.text,
        family.head,
        family.parts,
        family.architecture,
    )
    assert traced.layer(sizes, header.config) == family.layer(sizes, header.config)
    for mine, theirs in zip(traced.groups(sizes, header.config), family.groups(sizes, header.config), strict=True):
        assert replace(mine, cuts=()) == replace(theirs, cuts=())
        assert set(mine.cuts) == set(theirs.cuts)


def _uniform(name: str) -> dict[str, Any]:
    return {"layer_types": ["full_attention"] * 2} if name == "gemma3_text" else {}


def test_a_traced_family_takes_the_shapes_of_the_stock_class(models: dict[str, Path]) -> None:
    for source in models.values():
        header = read_header(source)
        family: Family = family_of(header)
        assert family.shapes(header).items() <= {n: s.shape for n, s in header.tensors.items()}.items()
        cut = Header(family.with_units(header.config, {"intermediate_size": 40}), {}, {})
        assert family_of(cut).sizes(cut).ffn == family.sizes(cut).ffn == 40


def test_what_was_found_is_plain_data(models: dict[str, Path]) -> None:
    found, config = little("starcoder2", models)
    assert found == little("starcoder2", models)[0]
    assert family_of_found(found, config).architecture == "Starcoder2ForCausalLM"
    weights = load_file(models["starcoder2"] / "model.safetensors")
    assert {cut.tensor for cut in (*found.ffn_cuts, *found.head_cuts)} <= {n.split(".", 3)[-1] for n in weights}
