"""Families against their stock classes, config by config: what a config leaves out, which it refuses, what it computes.

Shapes are compared on the meta device, on configs with nothing in them that has a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.arch import FAMILIES, Family, described, family_of
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.reader import Reader
from compress.errors import UserError
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import loads
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


BIASED = ["llama", "qwen2", "qwen3", "smollm3", "glm", "glm4", "phi3", "mistral", "glm4v"]
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 4}


def minimal(name: str, **changes: Any) -> dict[str, Any]:
    """A config.json of a family with nothing in it that has a default, but for `changes` of its text."""
    family = FAMILIES[name]
    text = {key: value for key, value in MINIMAL.items() if key != "num_key_value_heads"}
    text |= {"hidden_size": 512, "num_attention_heads": 64, "pad_token_id": 0, **changes}
    start: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    if name == "mistral":
        start["sliding_window"] = None
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


def text_shapes(family: Family, found: Shapes, tied: bool) -> Shapes:
    """Of the tensors of a stock model, those of the decoder and the output matrix, where it is stored."""
    text = {key: shape for key, shape in found.items() if key.startswith(f"{family.text}.")}
    return text if tied else {**text, f"{family.head}.weight": found[f"{family.head}.weight"]}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_plan_leaves_is_what_stock_transformers_takes(case: str, tmp_path: Path) -> None:
    """Heads and FFN cut at once, on headers: every tensor of the plan has the shape that its config means."""
    name, changes = CONFIGS[case]
    config = minimal(name, **changes)
    header = Header(config=config, tensors={}, locations={})
    sizes, shapes = FAMILIES[name].sizes(header), FAMILIES[name].shapes(header)
    model = sparse.save(tmp_path / "model", config, shapes)
    heads = max(32, sizes.kv_heads)
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
        ({"model_type": "qwen2", **SLIDING, "max_window_layers": 3}, "use_sliding_window must be false, found true"),
        ({"model_type": "qwen3", **SLIDING, "max_window_layers": 3}, "use_sliding_window must be false, found true"),
        ({"model_type": "qwen3", **SLIDING, "num_hidden_layers": 29}, "use_sliding_window must be false, found true"),
        ({"model_type": "qwen2", **SLIDING, "max_window_layers": 4}, None),
        ({"model_type": "qwen2", **SLIDING, "use_sliding_window": False, "max_window_layers": 0}, None),
        ({"model_type": "qwen2", **SLIDING, "sliding_window": None, "max_window_layers": 0}, None),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "may not hold 'sliding_att"),
        ({"model_type": "qwen3", **SLIDING, "layer_types": ["full_attention"] * 4}, None),
        ({"model_type": "smollm3", **SLIDING}, "use_sliding_window must be false, found true"),
        ({"model_type": "smollm3", **SLIDING, "sliding_window": None}, None),
        ({"model_type": "smollm3", "layer_types": ["chunked_attention"]}, "layer_types may not hold 'chunked_att"),
        ({"model_type": "phi3", "sliding_window": 4095}, "must be null or at least max_position_embeddings"),
        ({"model_type": "phi3", "sliding_window": 4096}, None),
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


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 3, 4])
def test_a_window_is_where_the_stock_class_puts_it(name: str, first: int) -> None:
    config = minimal(name, **SLIDING, max_window_layers=first)
    slides = "sliding_attention" in stock_config(config).layer_types
    assert (FAMILIES[name].unlike(config) is not None) == slides == (first < 4)


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
