"""GLM-4 as its hub folders first were (`glm`: glm-4-9b-chat-hf): fused gate and up, biases of q, k, v by one key.

Half of a head's rows rotate, interleaved. head_dim is a key of its own, so heads may be of any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Group, Sizes
from compress.arch.layer import QKV, decoder_layer, ffn_fused, query_heads
from compress.arch.llama import LLAMA
from compress.arch.refusals import no_null
from compress.arch.rope import INTERLEAVED


def biased(config: Mapping[str, Any]) -> bool:
    """Whether q, k and v have biases: GlmConfig and Glm4Config say yes where the key is missing."""
    return bool(config.get("attention_bias", True))


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return decoder_layer(sizes, biases=QKV if biased(config) else (), fused_ffn=True)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    return (query_heads(sizes, bias=biased(config)), ffn_fused(sizes))


GLM = replace(
    LLAMA,
    name="glm",
    model_type="glm",
    architecture="GlmForCausalLM",
    rope=INTERLEAVED,
    rotary=0.5,
    layer=_layer,
    groups=_groups,
    refuse=lambda sizes, config: None,
    rewrites=(),
    unlike=lambda config: no_null(config, "head_dim", "num_key_value_heads"),
    vllm=None,
    defaults={"num_key_value_heads": 2, "head_dim": 128},
)
