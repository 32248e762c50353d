"""Families against their stock classes, config by config: what a config leaves out, which it refuses, what it computes.

Shapes are compared on the meta device, on configs with nothing in them that has a default.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.arch import FAMILIES, Family, described, family_of
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.reader import Reader
from compress.data import DataSpec
from compress.errors import UserError
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import Recipe, loads
from compress.run import run
from compress.steps.prune.options import PruneOptions
from compress.stream import forward
from compress.stream.forward import Stream
from compress.stream.stock import stock_config
from tests import sparse, tiny
from tests.matrix import LOADED
from tests.stock import load, logits
from tests.unit.test_families import MINIMAL, Shapes, stock_shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pico model a family that stock transformers loads."""
    folder = tmp_path_factory.mktemp("families")
    return {name: getattr(tiny, name)(folder / name) for name in LOADED}


BIASED = ["llama", "qwen2", "qwen3", "smollm3", "gemma3_text", "glm", "glm4", "phi3", "mistral", "glm4v"]
WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 16}


def minimal(name: str, **changes: Any) -> dict[str, Any]:
    """A config.json of a family with nothing in it that has a default, but for `changes` of its text."""
    family = FAMILIES[name]
    text = {key: value for key, value in MINIMAL.items() if key != "num_key_value_heads"}
    text |= {"hidden_size": 512, "num_attention_heads": 64, "pad_token_id": 0, **changes}
    start: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    if family.text != "model":
        vision = {"hidden_size": 32, "num_heads": 2, "depth": 1, "out_hidden_size": 512}
        kind = {"model_type": "glm_image_text"} if name == "glm46v" else {}
        return {**start, "text_config": {**text, **kind}, "vision_config": vision}
    return {**start, **text}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOADED},
    **{f"{name}-biased": (name, {"attention_bias": True, "mlp_bias": True}) for name in BIASED},
    **{f"{name}-unbiased": (name, {"attention_bias": False}) for name in ("glm", "glm4", "qwen2")},
    **{f"{name}-null": (name, {"num_key_value_heads": None}) for name in ("llama", "qwen2", "smollm3", "phi3")},
    **{f"{name}-narrow": (name, {"head_dim": 6}) for name in ("mistral", "qwen2", "qwen3", "smollm3", "glm4", "phi3")},
    "smollm3-untied": ("smollm3", {"tie_word_embeddings": False}),
    "gemma3_text-untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_config_leaves_out_is_what_its_class_fills_in(case: str) -> None:
    name, changes = CONFIGS[case]
    config = minimal(name, **changes)
    header = Header(config=config, tensors={}, locations={})
    family, found = family_of(header), stock_shapes(config)
    assert family is FAMILIES[name] and found is not None
    tied = family.sizes(header).tied
    assert stock_config(config).tie_word_embeddings == tied
    assert family.shapes(header) == text_shapes(family, found, tied)


def test_a_qwen2_5_vl_may_have_its_text_keys_beside_all_others() -> None:
    """As the configs of the hub have them."""
    nested = minimal("qwen2_5_vl")
    flat = {**nested.pop("text_config"), **nested}
    header = Header(config=flat, tensors={}, locations={})
    family = family_of(header)
    cut = family.with_units(flat, {"intermediate_size": 40})
    for config in (flat, cut):
        found = stock_shapes(config)
        assert found is not None
        assert family.shapes(replace(header, config=config)) == text_shapes(family, found, tied=False)


def text_shapes(family: Family, found: Shapes, tied: bool) -> Shapes:
    """Of the tensors of a stock model, those of the decoder and the output matrix, where it is stored."""
    inside = f"{family.text}."
    text = {f"{family.root}.{k.removeprefix(inside)}": shape for k, shape in found.items() if k.startswith(inside)}
    return text if tied else {**text, f"{family.head}.weight": found[f"{family.head}.weight"]}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_plan_leaves_is_what_stock_transformers_takes(case: str, tmp_path: Path) -> None:
    """Heads and FFN cut at once, on headers: every tensor of the plan has the shape that its config means."""
    name, changes = CONFIGS[case]
    config = minimal(name, **changes)
    header = Header(config=config, tensors={}, locations={})
    sizes, shapes = FAMILIES[name].sizes(header), FAMILIES[name].shapes(header)
    model = sparse.save(tmp_path / "model", config, shapes)
    heads = sizes.heads if name == "qwen2_5_vl" else max(32, sizes.kv_heads)
    recipe = loads(f"model: {model}\nsteps:\n  - prune: {{keep_ffn: 40, keep_heads: {heads}}}\n")
    (step,) = make_plan(recipe, Machine(1), check_machine=False).steps
    found = stock_shapes(dict(step.after.config))
    assert found is not None
    planned = {key: spec.shape for key, spec in step.after.tensors.items()}
    assert planned.keys() == shapes.keys() and planned != shapes
    assert planned == text_shapes(family_of(step.after), found, sizes.tied)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]},
            "'chunked_attention' in layer",
        ),
        (
            {"model_type": "smollm3", "layer_types": ["linear_attention"]},
            "'linear_attention' in layer_types is not sup",
        ),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "but this qwen2 has no sliding_window"),
        (
            {"model_type": "smollm3", "layer_types": ["sliding_attention"], "use_sliding_window": True},
            "has no sliding_w",
        ),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"], "use_sliding_window": True}, None),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention"]}, None),
        (
            {"model_type": "gemma3_text", "layer_types": ["sliding_attention"], "sliding_window": None},
            "has no sliding_w",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention must be false",
        ),
        ({"model_type": "qwen2", "head_dim": None}, "a qwen2 cannot have a head_dim of null"),
        ({"model_type": "glm4", "head_dim": None}, "a glm4 cannot have a head_dim of null"),
        ({"model_type": "glm", "num_key_value_heads": None}, "a glm cannot have a num_key_value_heads of null"),
        ({"model_type": "phi3", "head_dim": None}, "a phi3 cannot have a head_dim of null"),
    ],
)
def test_what_the_executor_or_stock_code_does_not_take_is_refused(config: dict[str, Any], line: str | None) -> None:
    if line is None:
        assert described(config).name == config["model_type"]
        return
    with pytest.raises(UserError) as caught:
        described(config)
    assert line in caught.value.message and "\n" not in caught.value.message


def test_a_phi3_with_longrope_keeps_its_heads(tmp_path: Path) -> None:
    factors = [1.0, 2.0, 4.0]  # for the 6 rotary rows of a head
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    rope |= {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 128}
    model = tiny.phi3(tmp_path / "model", rope_parameters=rope, original_max_position_embeddings=128)
    text = f"model: {model}\nsteps:\n  - prune: {{%s}}\n"
    make_plan(loads(text % "keep_ffn: 40"), Machine(1), check_machine=False)
    with pytest.raises(UserError) as caught:
        make_plan(loads(text % "keep_heads: 4"), Machine(1), check_machine=False)
    assert "counts the factors of longrope by hidden_size // heads and would not load 4 heads" in caught.value.message
    config = dict(read_header(model).config)
    assert stock_shapes(config) is not None
    assert stock_shapes({**config, "num_attention_heads": 4, "head_dim": 8}) is None


@pytest.mark.parametrize("name", LOADED)
def test_the_stream_computes_what_the_stock_model_computes(name: str, models: dict[str, Path]) -> None:
    ids = torch.randint(0, 250, (2, 48), generator=torch.Generator().manual_seed(3))
    with Reader(models[name]) as reader:
        streamed = Stream(reader, FAMILIES[name], dtype=torch.float32).logits(ids)
    expected = logits(load(models[name]), {"input_ids": ids})
    torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)


MIXED = ["sliding_attention", "full_attention"]
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {  # all windows are shorter than the text
    "mistral": ("mistral", {"sliding_window": 16}),
    "phi3": ("phi3", {"sliding_window": 16}),
    "qwen2-from-a-layer-on": ("qwen2", {**WINDOWED, "max_window_layers": 1}),
    "qwen3-by-layer-types": ("qwen3", {**WINDOWED, "layer_types": MIXED}),
    "smollm3": ("smollm3", WINDOWED),
    "gemma3-by-pattern": ("gemma3_text", {"layer_types": None, "sliding_window": 8, "num_hidden_layers": 7}),
    "gemma3-capped": ("gemma3_text", {"final_logit_softcapping": 2.0}),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_is_streamed_and_cut_as_the_stock_class_computes_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two windows and one, in the text's length: masks are those of every batch."""
    monkeypatch.setattr(forward, "BATCH_TOKENS", 96)
    name, changes = WINDOWS[case]
    source = getattr(tiny, name)(tmp_path / "source", **changes)
    ids = torch.randint(0, 250, (3, 48), generator=torch.Generator().manual_seed(3))
    options = PruneOptions(keep_ffn=41, keep_heads=4)
    recipe = Recipe.single("prune", str(source), options, data=DataSpec(source="builtin", samples=3, length=48))
    for folder in (source, run(recipe, tmp_path / "out", Machine(1)).out):
        with Reader(folder) as reader:
            streamed = Stream(reader, FAMILIES[name], dtype=torch.float32).logits(ids)
        whole = load(folder)
        torch.testing.assert_close(streamed, logits(whole, {"input_ids": ids}), rtol=1e-5, atol=1e-5)
    if "capped" not in case:
        seen = torch.ones(3, 1, 48, 48, dtype=torch.bool).tril()  # as it is, where a model has one kind of layers
        given = seen if name in ("mistral", "phi3") else {"full_attention": seen, "sliding_attention": seen}
        assert not torch.allclose(streamed, whole(ids, attention_mask=given).logits, atol=1e-2)  # the window matters


@pytest.mark.parametrize("name", LOADED)
def test_the_first_layer_alone_is_a_config_that_stock_transformers_builds(name: str, models: dict[str, Path]) -> None:
    """What a config says of each layer goes with the layers: layer_types, no_rope_layers."""
    header = read_header(models[name])
    whole, first = stock_shapes(dict(header.config)), stock_shapes(FAMILIES[name].shallow(header, [0]))
    assert whole is not None and first is not None
    assert first == {key: shape for key, shape in whole.items() if key in first}
    assert {key for key in whole if key not in first} == {
        key for key in whole if key.startswith(f"{FAMILIES[name].text}.layers.") and ".layers.0." not in key
    }
