"""Mistral without a sliding window: the block of a llama without biases, whose heads may be of any number and width.

Pruned llamas whose heads do not divide the hidden size are written under this label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Group, Sizes, decoder_layer, ffn_split, query_heads
from compress.arch.llama import LLAMA


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    del config  # stock MistralAttention and MistralMLP have no biases, whatever the config says
    return decoder_layer(sizes)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    del config
    return (query_heads(sizes, bias=False), ffn_split(sizes, bias=False))


def _unlike(config: Mapping[str, Any]) -> str | None:
    window = config.get("sliding_window", 4096)  # MistralConfig's default
    if window is None:
        return None
    return f"mistral is supported with full attention only: sliding_window must be null, found {window!r}"


MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=_layer,
    groups=_groups,
    refuse=lambda sizes, config: None,
    rewrites=(),
    unlike=_unlike,
    defaults={"num_key_value_heads": 8},
)
