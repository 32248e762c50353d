"""The family descriptions against stock transformers: which shapes load, what configs mean, in which order rows rotate.

The first test is the table of docs/families.md: a plan may write what stock transformers loads, and nothing else.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Glm4vConfig,
    Glm46VConfig,
    GlmImageConfig,
    LlamaConfig,
    MistralConfig,
)

from compress.arch import FAMILIES, FLAVOURS, described, family_of
from compress.arch.rope import HALF_SPLIT, INTERLEAVED, arranged, head_order, rotary_rows, row_orders
from compress.checkpoint.headers import Header, read_header
from compress.data import DataSpec
from compress.errors import UserError
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import Recipe, loads
from compress.steps.prune.options import PruneOptions
from compress.stream.stock import stock_config, stock_model
from tests import sight, sparse, tiny

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pico model a family."""
    folder = tmp_path_factory.mktemp("families")
    return {name: getattr(tiny, name)(folder / name) for name in FAMILIES}


# Which shapes stock transformers loads.


def stock_shapes(config: dict[str, Any]) -> Shapes | None:
    """Names and shapes that the stock class of a config takes; None where it refuses the config."""
    try:
        return {name: tuple(value.shape) for name, value in stock_model(config).state_dict().items()}
    except UserError:
        return None


@pytest.mark.parametrize(("heads", "ffn"), [(8, 33), (6, 96), (4, 40)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_shape_is_refused_exactly_where_stock_transformers_does_not_load_it(
    name: str, heads: int, ffn: int, models: dict[str, Path]
) -> None:
    family, header = FAMILIES[name], read_header(models[name])
    changes = {"num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": ffn}
    config = family.with_units(header.config, changes)
    cut = Header(config=config, tensors={}, locations={})
    sizes = replace(family.sizes(header), heads=heads, ffn=ffn)
    implied, found = family.shapes(cut), stock_shapes(config)
    loaded = found is not None and implied == {key: found.get(family.parameter(key)) for key in implied}
    if family.stock is not None:  # 8 heads of 8 are plain glm4v again
        assert loaded == (heads == 8)
    else:
        assert loaded == (family.refuse(sizes, config) is None)
    for flavour in FLAVOURS:  # and each label that a plan would give it loads: but for native, which says so
        rewrite, why = family.label(config, sizes, flavour)
        if rewrite is None:
            assert "does not become native" in why or (not family.rewrites and why == family.refuse(sizes, config))
            continue
        labelled = rewrite.config(config)
        of = described(labelled)
        taken = stock_shapes(labelled)
        assert (taken is not None and implied == {key: taken.get(of.parameter(key)) for key in implied}) == (
            of.stock is None or heads == 8
        )
        assert labelled["architectures"] == [of.architecture]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pico_model_is_the_family_it_is_named_after(name: str, models: dict[str, Path]) -> None:
    header = read_header(models[name])
    family = family_of(header)
    assert family is FAMILIES[name] and family.name == name
    implied = family.shapes(header)
    assert implied == {key: spec.shape for key, spec in header.tensors.items() if key in implied}


@pytest.mark.parametrize(
    ("model", "options", "line"),
    [
        ("llama", "keep_heads: 5", "5 heads cannot stay: the model has 8, and every one of 2 KV heads keeps equally"),
        ("glm4v", "keep_heads: 7", "7 heads cannot stay: the model has 8, and every one of 2 KV heads keeps equally"),
        ("glm46v", "keep_heads: 3", "3 heads cannot stay: the model has 6, and every one of 2 KV heads keeps equally"),
        (
            "glm46v_interleaved",
            "keep_heads: 6, flavour: native",
            "steps.0.prune.flavour: a glm46v does not become native; allowed: portable",
        ),
        ("glm4v", "keep_heads: 6, flavour: nativ", "steps.0.prune.flavour: unknown flavour 'nativ'; did you mean 'nat"),
    ],
)
def test_what_nothing_would_load_is_refused(model: str, options: str, line: str, models: dict[str, Path]) -> None:
    with pytest.raises(UserError) as caught:
        recipe = loads(f"model: {models[model]}\nsteps:\n  - prune: {{{options}}}\n")
        make_plan(recipe, Machine(1), check_machine=False)
    assert line in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_a_biased_llama_keeps_to_heads_that_divide(biases: dict[str, bool], tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model", **biases)
    text = f"model: {model}\nsteps:\n  - prune: {{keep_heads: %d}}\n"
    make_plan(loads(text % 4), Machine(1), check_machine=False)
    with pytest.raises(UserError) as caught:
        make_plan(loads(text % 6), Machine(1), check_machine=False)
    said = caught.value.message
    assert (
        "keep_heads: stock transformers loads a llama only if its heads divide hidden_size: 6 does not divide 64"
        in said
    )
    assert f"mistral, the class that would take them, has no biases, and {next(iter(biases))} is true" in said


# What a config means.


MINIMAL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 384,
}


def test_configs_that_no_family_describes(tmp_path: Path) -> None:
    for config, line in (
        ({"model_type": "qwen33"}, "config.json: model_type 'qwen33' is not supported; did you mean 'qwen3'?"),
        (
            {"model_type": "glm46v", "text_config": {"model_type": "glm4_moe"}},
            "text_config.model_type must be glm4v_te",
        ),
    ):
        with pytest.raises(UserError) as caught:
            described(config)
        assert line in caught.value.message


def fields(config: Any) -> dict[str, Any]:
    """What a stock config object holds, defaults filled in."""
    ours = {"model_type", "architectures", "transformers_version", "_name_or_path", "sliding_window", "head_dim"}
    return {key: value for key, value in config.to_dict().items() if key not in ours}


@pytest.mark.parametrize("minimal", [True, False])
def test_a_relabelled_config_means_the_same(minimal: bool) -> None:
    """Stock classes fill in other defaults for the keys that a config leaves out: none may change."""
    extra: dict[str, Any] = {} if minimal else {"max_position_embeddings": 99, "rms_norm_eps": 0.5, "rope_theta": 7.0}
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **MINIMAL, **extra}
    rewrite = FAMILIES["llama"].rewrites[0]
    before, after = fields(stock_config(llama)), fields(stock_config(rewrite.config({**llama, "head_dim": 8})))
    gone = {"attention_bias", "mlp_bias", "pretraining_tp"}
    assert gone <= before.keys() and not gone & after.keys()
    assert after == {key: value for key, value in before.items() if key not in gone}
    vision = {"hidden_size": 32, "num_heads": 2, "depth": 1, "out_hidden_size": 64}
    glm = {
        "model_type": "glm4v",
        "architectures": ["Glm4vForConditionalGeneration"],
        "text_config": {**MINIMAL, **extra},
        "vision_config": vision,
    }
    rewrite = FAMILIES["glm4v"].rewrites[0]
    before, after = fields(stock_config(glm)), fields(stock_config(rewrite.config(glm)))
    old, new = before.pop("text_config"), after.pop("text_config")
    assert after == before
    expected = {
        **old,
        "model_type": "glm_image_text",
        "attention_bias": True,
        "pad_token_id": 0,
        "eos_token_id": None,  # a key that GlmImageTextConfig has
        "vision_vocab_size": new["vision_vocab_size"],  # of the parts of GLM-Image that a text decoder has not
    }
    assert new == expected


def test_the_defaults_that_differ_are_still_those(tmp_path: Path) -> None:
    """What the relabelling spells out is what stock classes fill in differently: a new version may change it."""
    text = GlmImageConfig().text_config
    assert (LlamaConfig().max_position_embeddings, MistralConfig().max_position_embeddings) == (2048, 131072)
    assert (Glm4vConfig().text_config.max_position_embeddings, text.max_position_embeddings) == (32768, 131072)
    assert (Glm4vConfig().video_start_token_id, Glm46VConfig().video_start_token_id) == (151341, 151361)
    assert (Glm4vConfig().text_config.pad_token_id, text.pad_token_id) == (None, 167841)


@pytest.mark.parametrize(
    ("given", "pad"),
    [
        ({"pad_token_id": 7, "eos_token_id": 3}, 7),
        ({"pad_token_id": None, "eos_token_id": [5, 6]}, 5),
        ({"eos_token_id": 4}, 4),
        ({}, 0),
    ],
)
def test_the_portable_flavour_has_a_padding_token_inside_the_vocabulary(given: dict[str, Any], pad: int) -> None:
    config = FAMILIES["glm4v"].rewrites[0].config({"model_type": "glm4v", "text_config": {**MINIMAL, **given}})
    assert config["text_config"]["pad_token_id"] == pad
    assert config["text_config"]["eos_token_id"] == given.get("eos_token_id")
    assert stock_config(config).text_config.pad_token_id == pad


def test_a_rewrite_leaves_its_input_alone() -> None:
    config = {"model_type": "glm4v", "text_config": dict(MINIMAL), "vision_config": {"depth": 1}, "auto_map": {}}
    kept = {**config, "text_config": dict(MINIMAL), "vision_config": {"depth": 1}}
    for rewrite in FAMILIES["glm4v"].rewrites:
        rewrite.config(config)
    assert config == kept


# The order of rotary rows.


def test_half_split_order_by_hand() -> None:
    assert head_order(8, 4, INTERLEAVED, HALF_SPLIT) == [0, 2, 1, 3, 4, 5, 6, 7]
    assert head_order(12, 8, INTERLEAVED, HALF_SPLIT) == [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11]
    assert head_order(6, 6, HALF_SPLIT, INTERLEAVED) == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("head_dim", "rotary"), [(128, 64), (64, 64), (10, 4), (8, 0)])
def test_one_order_undoes_the_other(head_dim: int, rotary: int) -> None:
    rows = torch.arange(head_dim)
    there = head_order(head_dim, rotary, INTERLEAVED, HALF_SPLIT)
    back = head_order(head_dim, rotary, HALF_SPLIT, INTERLEAVED)
    assert torch.equal(rows[there][back], rows) and torch.equal(rows[back][there], rows)
    assert there[rotary:] == list(range(rotary, head_dim))
    assert head_order(head_dim, rotary, HALF_SPLIT, HALF_SPLIT) == list(range(head_dim))


@pytest.mark.parametrize(
    ("rope", "rows"),
    [
        ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}}, 4),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1, 0]}, "partial_rotary_factor": 0.5}, 4),
        ({"partial_rotary_factor": 0.25}, 2),
        ({}, 8),
    ],
)
def test_rotary_rows_are_those_of_the_stock_class(rope: dict[str, Any], rows: int) -> None:
    config = {"model_type": "glm4v", "text_config": {**MINIMAL, **rope}, "vision_config": {}}
    family = FAMILIES["glm4v"]
    sizes = family.sizes(Header(config=config, tensors={}, locations={}))
    assert rotary_rows(sizes, config["text_config"]) == rows
    stock = stock_config({**config, "architectures": ["Glm4vForConditionalGeneration"]}).text_config
    assert int(8 * stock.rope_parameters.get("partial_rotary_factor", 1.0)) == rows


@pytest.mark.parametrize("share", ["half", True, -0.5, 1.5, float("nan"), float("inf"), [0.5]])
def test_a_rotary_share_that_is_none_is_refused(share: object) -> None:
    config = {"model_type": "glm4", **MINIMAL, "rope_scaling": {"partial_rotary_factor": share}}
    sizes = FAMILIES["glm4"].sizes(Header(config=config, tensors={}, locations={}))
    with pytest.raises(UserError, match="partial_rotary_factor must be a number from 0 to 1"):
        rotary_rows(sizes, config)


def test_rows_move_with_everything_that_has_one_entry_a_row(models: dict[str, Path]) -> None:
    header = read_header(models["glm4v"])
    sizes = FAMILIES["glm4v"].sizes(header)
    orders = row_orders(sizes, header.text_config, INTERLEAVED, HALF_SPLIT)
    assert {name: len(order) for name, order in orders.items()} == {"self_attn.q_proj": 64, "self_attn.k_proj": 16}
    assert row_orders(sizes, header.text_config, HALF_SPLIT, HALF_SPLIT) == {}
    for name in ("weight", "bias", "SCB", "weight_packed", "weight_scale"):
        value = torch.arange(16)[:, None] if name.startswith("weight") else torch.arange(16)
        moved = arranged(f"self_attn.k_proj.{name}", value, orders)
        assert moved.flatten().tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]
    shape, scalar = torch.tensor([16, 64]), torch.tensor(0)
    assert torch.equal(arranged("self_attn.k_proj.weight_shape", shape, orders), shape)
    assert torch.equal(arranged("self_attn.k_proj.weight_format", scalar, orders), scalar)
    assert torch.equal(arranged("self_attn.v_proj.weight", torch.arange(16), orders), torch.arange(16))


# What inspect says of it.


def test_inspect_tells_what_can_be_cut_and_who_loads_it(tmp_path: Path) -> None:
    import compress

    found = compress.inspect(sparse.glm41v_9b(tmp_path / "glm"))
    assert [(g["group"], g["step"], g["multiple"]) for g in found["groups"]] == [("heads", 2, 2), ("ffn", 1, 256)]
    even = list(range(2, 32, 2))
    portable, native, drop = {"flavour": "portable"}, {"flavour": "native"}, {"kv_merge": "drop"}
    shown = [(cut["option"], cut["besides"], cut["keep"], cut["model_type"]) for cut in found["cuts"]]
    assert shown == [
        ("keep_heads", portable, even, "glm46v"),
        ("keep_heads", native, even, "glm4v"),
        ("keep_kv_heads", {}, [1], "glm4v"),
        ("keep_kv_heads", drop | portable, [1], "glm46v"),
        ("keep_kv_heads", drop | native, [1], "glm4v"),
        ("keep_ffn", {}, None, "glm4v"),
        ("keep_layers", {}, list(range(1, 40)), "glm4v"),
        ("keep_vision_layers", {}, list(range(1, 24)), "glm4v"),
        ("keep_vision_ffn", {}, None, "glm4v"),
    ]
    assert [len(cut["loaded_by"]) for cut in found["cuts"]] == [2, 1, 2, 2, 1, 2, 2, 2, 2]
    assert found["cuts"][1]["loaded_by"] == ["vLLM (its own class)"]
    assert found["loaded_by"][0] == "stock transformers (Glm4vForConditionalGeneration)"
    ten = sparse.llama(tmp_path / "ten", hidden_size=640, num_attention_heads=10, num_key_value_heads=1)
    cuts = compress.inspect(ten)["cuts"]
    assert [(cut["keep"], cut["model_type"]) for cut in cuts if cut["option"] in ("keep_heads", "keep_ffn")] == [
        ([1, 2, 4, 5, 8], "llama"),
        ([3, 6, 7, 9], "mistral"),
        (None, "llama"),
    ]


def test_inspect_tells_kv_heads_as_they_are_merged_and_dropped(tmp_path: Path) -> None:
    import compress

    cuts = compress.inspect(sparse.llama(tmp_path / "six", num_attention_heads=12, num_key_value_heads=6))["cuts"]
    merged = [(cut["besides"], cut["keep"], cut["model_type"]) for cut in cuts if cut["option"] == "keep_kv_heads"]
    drop = {"kv_merge": "drop"}
    assert merged == [({}, [1, 2, 3], "llama"), (drop, [1, 2, 3, 4], "llama"), (drop, [5], "mistral")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_does_what_inspect_says(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    import compress

    model, source = models[name], "builtin"
    if FAMILIES[name].tower:  # its layers are chosen on images
        model, source = sight.can_see(Path(shutil.copytree(model, tmp_path / name))), str(sight.chats(tmp_path))
    data = DataSpec(source=source, samples=4, length=64)
    for cut in compress.inspect(model)["cuts"]:
        for keep in cut["keep"] or [8]:
            options = PruneOptions(**{cut["option"]: keep, **cut["besides"], "force": True})
            recipe = Recipe.single("prune", str(model), options, data=data)
            (step,) = make_plan(recipe, Machine(1), check_machine=False).steps
            family = family_of(step.after)
            assert (family.model_type, family.architecture) == (cut["model_type"], cut["architecture"])
            assert list(family.loaders) == cut["loaded_by"]
