"""Qwen3 (dense): a llama with norms over q and k, and a head_dim of its own.

q_norm and k_norm are of one head's width and shared by all heads, so cutting heads leaves them alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Group, Sizes
from compress.arch.layer import QKVO, decoder_layer, ffn_split, query_heads
from compress.arch.qwen2 import QWEN2

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return decoder_layer(sizes, biases=QKVO if config.get("attention_bias") else (), head_norms=HEAD_NORMS)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    return (query_heads(sizes, bias=bool(config.get("attention_bias"))), ffn_split(sizes, bias=False))


QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=_layer,
    groups=_groups,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
