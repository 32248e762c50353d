"""GLM-4.1V (`glm4v`): the text tower is described here; the vision tower passes through every step untouched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.arch.family import Family, Group, Sizes, ffn_fused, query_heads


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    del config  # stock Glm4vTextAttention has q, k, v biases and no o bias, whatever the config says
    h, q, kv, f = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.ffn
    return {
        "input_layernorm.weight": (h,),
        "mlp.down_proj.weight": (h, f),
        "mlp.gate_up_proj.weight": (2 * f, h),
        "post_attention_layernorm.weight": (h,),
        "post_mlp_layernorm.weight": (h,),
        "post_self_attn_layernorm.weight": (h,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "self_attn.q_proj.bias": (q,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, h),
    }


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    del config
    return (query_heads(sizes, bias=True), ffn_fused(sizes))


def _refuse(sizes: Sizes) -> str | None:
    # Glm4vTextAttention ignores the head_dim key and takes hidden_size // num_attention_heads
    if sizes.heads * sizes.head_dim != sizes.hidden:
        return (
            "stock transformers' glm4v derives head_dim as hidden_size / heads and would not load "
            f"{sizes.heads} heads of {sizes.head_dim}; prune the FFN instead (ffn, keep_ffn, or ratio without heads)"
        )
    return None


GLM4V = Family(
    model_type="glm4v",
    architecture="Glm4vForConditionalGeneration",
    text="model.language_model",
    head="lm_head",
    rope_axes=3,
    layer=_layer,
    groups=_groups,
    refuse=_refuse,
    skip=("lm_head", "model.visual"),
)
