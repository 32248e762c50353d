"""Mistral without a sliding window: the block of a llama without biases, whose heads may be of any number and width.

Pruned llamas whose heads do not divide the hidden size are written under this label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.arch.family import Family, Group, Sizes, ffn_split, query_heads
from compress.arch.rope import HALF_SPLIT


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    del config  # stock MistralAttention and MistralMLP have no biases, whatever the config says
    h, q, kv, f = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.ffn
    return {
        "input_layernorm.weight": (h,),
        "mlp.down_proj.weight": (h, f),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "post_attention_layernorm.weight": (h,),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.v_proj.weight": (kv, h),
    }


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    del config
    return (query_heads(sizes, bias=False), ffn_split(sizes, bias=False))


def _unlike(config: Mapping[str, Any]) -> str | None:
    window = config.get("sliding_window", 4096)  # MistralConfig's default
    if window is None:
        return None
    return f"mistral is supported with full attention only: sliding_window must be null, found {window!r}"


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    text="model",
    head="lm_head",
    rope_axes=1,
    rope=HALF_SPLIT,
    layer=_layer,
    groups=_groups,
    refuse=lambda sizes: None,
    skip=("lm_head",),
    unlike=_unlike,
    vllm="its own class",
)
