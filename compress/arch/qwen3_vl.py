"""Qwen3-VL, dense (`qwen3_vl`): the text tower of a qwen3; the vision tower passes through untouched.

Features of inner vision blocks are added to what the first text layers give, at the places of images alone (DeepStack,
arXiv:2406.04334). That is between layers: no cut changes it, and no text sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.qwen3 import QWEN3
from compress.arch.refusals import no_null


def _unlike(config: Mapping[str, Any]) -> str | None:
    text = config.get("text_config")
    return no_null({**text, "model_type": "qwen3_vl"}, "head_dim") if isinstance(text, Mapping) else None


QWEN3_VL = replace(
    QWEN3,
    name="qwen3_vl",
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    text="model.language_model",
    skip=("lm_head", "model.visual"),
    layered=True,
    unlike=_unlike,
)
