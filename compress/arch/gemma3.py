"""Gemma 3, text alone (`gemma3_text`): norms around attention and FFN and over q and k, two ropes, sliding layers.

Which layers see a window only, which rope each has, the scale of the embeddings, and caps of logits are the stock
classes' own affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Group, Sizes
from compress.arch.layer import NORMS, QKVO, decoder_layer, ffn_split, query_heads
from compress.arch.llama import LLAMA, dividing
from compress.arch.qwen3 import HEAD_NORMS
from compress.arch.refusals import masked_attention

FFN_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    biases = QKVO if config.get("attention_bias") else ()
    return decoder_layer(sizes, biases=biases, norms=(*NORMS, *FFN_NORMS), head_norms=HEAD_NORMS)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    return (query_heads(sizes, bias=bool(config.get("attention_bias"))), ffn_split(sizes, bias=False))


def _unlike(config: Mapping[str, Any]) -> str | None:
    if config.get("use_bidirectional_attention"):
        return "gemma3_text is supported as a decoder only: use_bidirectional_attention must be false, found true"
    return masked_attention(config, config.get("sliding_window", 4096))


def _capped(config: Mapping[str, Any]) -> str | None:
    return "final_logit_softcapping caps its logits" if config.get("final_logit_softcapping") is not None else None


GEMMA3 = replace(
    LLAMA,
    name="gemma3_text",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    layer=_layer,
    groups=_groups,
    # Gemma3TextConfig.validate_architecture: hidden_size % num_attention_heads must be 0, whatever head_dim says
    refuse=lambda sizes, config: dividing(sizes, "gemma3_text"),
    rewrites=(),
    unlike=_unlike,
    head_beside=_capped,
    layered=True,
    vllm=None,
    defaults={
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
    },
)
