"""Qwen2 and Qwen2.5: a llama whose q, k and v have biases.

Qwen2Config has no head_dim, but keeps the key, and the attention and the rotary embedding read it: any number of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Group, Sizes
from compress.arch.layer import QKV, decoder_layer, ffn_split, query_heads
from compress.arch.llama import LLAMA
from compress.arch.refusals import masked_attention, no_null, switched_window


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    del config  # stock Qwen2Attention has q, k, v biases and no o bias, whatever the config says
    return decoder_layer(sizes, biases=QKV)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    del config
    return (query_heads(sizes, bias=True), ffn_split(sizes, bias=False))


def masked_and_sized(config: Mapping[str, Any]) -> str | None:
    """Why a config of type qwen2 or qwen3 is not the family described."""
    return masked_attention(config, switched_window(config)) or no_null(config, "head_dim")


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=_layer,
    groups=_groups,
    refuse=lambda sizes, config: None,
    rewrites=(),
    unlike=masked_and_sized,
    vllm=None,
    defaults={"num_key_value_heads": 32},
)
