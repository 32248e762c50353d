"""Mistral: the block of a llama without biases, whose heads may be of any number and width, with or without a window.

Pruned llamas whose heads do not divide the hidden size are written under this label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Group, Sizes
from compress.arch.layer import decoder_layer, ffn_split, query_heads
from compress.arch.llama import LLAMA


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    del config  # stock MistralAttention and MistralMLP have no biases, whatever the config says
    return decoder_layer(sizes)


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    del config
    return (query_heads(sizes, bias=False), ffn_split(sizes, bias=False))


MISTRAL = replace(
    LLAMA,
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=_layer,
    groups=_groups,
    refuse=lambda sizes, config: None,
    rewrites=(),
    unlike=lambda config: None,
    defaults={"num_key_value_heads": 8},
)
