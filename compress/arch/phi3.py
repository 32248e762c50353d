"""Phi-3 and Phi-4 (`phi3`): q, k and v are one matrix, and so are gate and up; no biases.

Query heads are the first rows of qkv_proj; the rows of k and v behind them stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Group, Sizes
from compress.arch.layer import QKV_FUSED, decoder_layer, ffn_fused, query_heads
from compress.arch.llama import LLAMA
from compress.arch.refusals import no_null
from compress.arch.rope import rotary_share


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    del config  # stock Phi3Attention and Phi3MLP have no biases, whatever the config says
    return decoder_layer(sizes, fused_qkv=True, fused_ffn=True)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    del config
    return (query_heads(sizes, bias=False, rows=QKV_FUSED), ffn_fused(sizes))


def _refuse(sizes: Sizes, config: Mapping[str, Any]) -> str | None:
    # Phi3Config.validate_rope counts the factors of longrope by hidden_size // heads, whatever head_dim says
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return None
    factors = [rope[key] for key in ("short_factor", "long_factor") if isinstance(rope.get(key), list)]
    counted = int(sizes.hidden // sizes.heads * rotary_share(config)) // 2
    if all(len(each) == counted for each in factors):
        return None
    return (
        "stock transformers' phi3 counts the factors of longrope by hidden_size // heads and would not load "
        f"{sizes.heads} heads of {sizes.head_dim}"
    )


PHI3 = replace(
    LLAMA,
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    layer=_layer,
    groups=_groups,
    refuse=_refuse,
    rewrites=(),
    unlike=lambda config: no_null(config, "head_dim"),
    vllm=None,
    defaults={},
)
