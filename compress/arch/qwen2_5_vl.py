"""Qwen2.5-VL (`qwen2_5_vl`): the text tower of a qwen2; the vision tower passes through untouched.

On disk the decoder stands below `model` and the vision tower below `visual`, as in the checkpoints of the hub and in
what stock transformers saves; in the stock model both stand one module deeper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Sizes
from compress.arch.qwen2 import QWEN2
from compress.arch.refusals import masked_attention, switched_window


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of the text tower: folders of the hub may have them beside all others."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _unlike(config: Mapping[str, Any]) -> str | None:
    text = text_of(config)
    return masked_attention({**text, "model_type": "qwen2_5_vl"}, switched_window(text))


def _derived_head_dim(sizes: Sizes, config: Mapping[str, Any]) -> str | None:
    del config
    # Qwen2_5_VLAttention takes hidden_size // num_attention_heads, and wants them to divide
    if sizes.heads * sizes.head_dim == sizes.hidden:
        return None
    return (
        "stock transformers' qwen2_5_vl derives head_dim as hidden_size // heads and would not load "
        f"{sizes.heads} heads of {sizes.head_dim}"
    )


QWEN2_5_VL = replace(
    QWEN2,
    name="qwen2_5_vl",
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    text="model.language_model",
    stored="model",
    refuse=_derived_head_dim,
    skip=("lm_head", "model.visual"),
    unlike=_unlike,
    layered=False,  # stock transformers renames its tensors by the name of its own class
    defaults={"num_key_value_heads": 8},
)
