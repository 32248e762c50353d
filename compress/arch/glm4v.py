"""GLM-4.1V (`glm4v`) and its relatives: the text tower is described, and what of the vision tower can be cut.

Four families are one decoder: plain glm4v; glm4v with a head_dim of its own, which only vLLM reads (the flavour
native); glm46v over glm4v's text class; and glm46v over glm_image_text, whose rotary rows are half-split: what stock
transformers loads with any number of heads (the flavour portable).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Family, Group, Rewrite, Sizes
from compress.arch.layer import QKV, SANDWICH, decoder_layer, ffn_fused, query_heads
from compress.arch.rope import HALF_SPLIT, INTERLEAVED
from compress.arch.tower import Tower, TowerKeys, TowerSizes
from compress.checkpoint.per_layer import HEADS, KEY

PORTABLE, NATIVE = "portable", "native"

# Keys that a source may leave out and for which the portable flavour's classes fill in other values: what the source's
# classes (Glm4vConfig, Glm4vTextConfig) fill in is written out.
DEFAULTS = {"video_start_token_id": 151341, "video_end_token_id": 151342}
TEXT_DEFAULTS = {"max_position_embeddings": 32768, "eos_token_id": None}


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    del config  # stock Glm4vTextAttention has q, k, v biases and no o bias, whatever the config says
    return decoder_layer(sizes, biases=QKV, norms=SANDWICH, fused_ffn=True)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    del config
    return (query_heads(sizes, bias=True), ffn_fused(sizes))


def _derived_head_dim(sizes: Sizes, config: Mapping[str, Any]) -> str | None:
    del config
    # Glm4vTextAttention ignores the head_dim key and takes hidden_size // num_attention_heads
    if sizes.hidden // sizes.heads == sizes.head_dim:
        return None
    return (
        "stock transformers' glm4v derives head_dim as hidden_size // heads and would not load "
        f"{sizes.heads} heads of {sizes.head_dim}"
    )


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return dict(text) if isinstance(text, Mapping) else {}


def _reads_head_dim(config: Mapping[str, Any]) -> bool:
    """Whether head_dim says something else than what stock glm4v derives, in any layer; not where a size is missing."""
    text = _text(config)
    width, hidden, heads = (text.get(key) for key in ("head_dim", "hidden_size", HEADS))
    if width is None or type(hidden) is not int or type(heads) is not int or heads <= 0:
        return False
    said = text.get(KEY)
    layers = said.values() if isinstance(said, Mapping) else ()
    own = [layer[HEADS] for layer in layers if isinstance(layer, Mapping) and HEADS in layer]
    return any(width != hidden // count for count in (heads, *own) if type(count) is int and count > 0)


def _from_glm4v(config: Mapping[str, Any]) -> dict[str, Any]:
    # Glm4vConfig passes an inner tie_word_embeddings on to the model, Glm46VConfig does not
    tied = config.get("tie_word_embeddings") or _text(config).get("tie_word_embeddings")
    return _as_portable({**DEFAULTS, **config, "tie_word_embeddings": bool(tied)})


def _as_portable(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = _text(config), config.get("vision_config")
    changes: dict[str, Any] = {"model_type": "glm_image_text", "attention_bias": True}
    if type(text.get("pad_token_id")) is not int:  # GlmImageTextConfig takes no null, and fills in 167841
        eos = text.get("eos_token_id")
        first = eos[0] if isinstance(eos, list) and eos else eos
        changes["pad_token_id"] = first if type(first) is int else 0
    new = {
        **{key: value for key, value in config.items() if key != "auto_map"},
        "model_type": "glm46v",
        "architectures": ["Glm46VForConditionalGeneration"],
        "text_config": {**TEXT_DEFAULTS, **text, **changes},
    }
    if isinstance(vision, Mapping):  # glm46v picks the vision class by this key, glm4v knows one only
        new["vision_config"] = {**vision, "model_type": "glm4v_vision"}
    return new


def _as_native(config: Mapping[str, Any]) -> dict[str, Any]:
    # without attention_bias, vLLM drops the biases of q, k and v
    return {**config, "text_config": {**_text(config), "attention_bias": True}}


PORTABLE_LABEL = Rewrite(
    flavour=PORTABLE,
    config=_from_glm4v,
    refuse=lambda config: None,
    why="glm46v over the text class glm_image_text is the same layer, reads head_dim, and rotates half-split",
)
NATIVE_LABEL = Rewrite(
    flavour=NATIVE,
    config=_as_native,
    refuse=lambda config: None,
    why="flavour native was asked for: vLLM's own glm4v reads head_dim; stock transformers does not load this flavour",
)

# Heads and FFN width of its blocks follow from hidden_size and out_hidden_size in stock code (Glm4vVisionAttention,
# Glm4VisionMlp): neither can be cut. `intermediate_size` is the merger's alone.
GLM4V_TOWER = Tower(
    path="model.visual",
    blocks="blocks",
    merger="merger",
    keys=TowerKeys(depth="depth", ffn="intermediate_size", width="out_hidden_size"),
    defaults=TowerSizes(depth=24, ffn=13696, width=4096),
)

GLM4V = Family(
    name="glm4v",
    model_type="glm4v",
    architecture="Glm4vForConditionalGeneration",
    text="model.language_model",
    head="lm_head",
    rope=INTERLEAVED,
    layer=_layer,
    groups=_groups,
    refuse=_derived_head_dim,
    skip=("lm_head", "model.visual"),
    vision="model.visual",
    tower=GLM4V_TOWER,
    layered=True,
    unlike=lambda config: "head_dim" if _reads_head_dim(config) else None,
    rewrites=(PORTABLE_LABEL, NATIVE_LABEL),
    vllm="its own class",
    defaults={"num_key_value_heads": 2},
)

GLM4V_NATIVE = replace(
    GLM4V,
    name="glm4v_native",
    refuse=lambda sizes, config: None,
    unlike=lambda config: None if _reads_head_dim(config) else "head_dim",
    rewrites=(PORTABLE_LABEL,),
    stock=PORTABLE_LABEL,
    layered=False,  # vLLM's own class builds every layer alike
)


def _text_class(expected: str, default: bool = False) -> Any:
    def unlike(config: Mapping[str, Any]) -> str | None:
        found = _text(config).get("model_type")
        if found == expected or (found is None and default):
            return None
        return f"text_config.model_type must be glm4v_text or glm_image_text for a glm46v, found {found!r}"

    return unlike


GLM46V = replace(
    GLM4V,
    name="glm46v",
    model_type="glm46v",
    architecture="Glm46VForConditionalGeneration",
    rope=HALF_SPLIT,
    refuse=lambda sizes, config: None,
    unlike=_text_class("glm_image_text"),
    tower=replace(GLM4V_TOWER, kind="glm4v_vision"),
    rewrites=(),
    vllm="the Transformers backend",
)

GLM46V_INTERLEAVED = replace(
    GLM46V,
    name="glm46v_interleaved",
    rope=INTERLEAVED,
    refuse=_derived_head_dim,
    unlike=_text_class("glm4v_text", default=True),
    rewrites=(replace(PORTABLE_LABEL, config=_as_portable),),
    vllm=None,
)
