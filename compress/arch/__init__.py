"""What differs between model families, as data: where the decoder sits, its tensors, and what can be cut from it.

To add a family: one file with a `Family` beside this one, one entry in `FAMILIES`, and a pico model in
tests/tiny.py. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from compress.arch.family import SAME, Cut, Family, Group, Rewrite, Sizes
from compress.arch.gemma3 import GEMMA3
from compress.arch.glm import GLM
from compress.arch.glm4 import GLM4
from compress.arch.glm4v import GLM4V, GLM4V_NATIVE, GLM46V, GLM46V_INTERLEAVED, NATIVE, PORTABLE
from compress.arch.llama import LLAMA
from compress.arch.mistral import MISTRAL
from compress.arch.phi3 import PHI3
from compress.arch.qwen2 import QWEN2
from compress.arch.qwen2_5_vl import QWEN2_5_VL
from compress.arch.qwen3 import QWEN3
from compress.arch.qwen3_vl import QWEN3_VL
from compress.arch.smollm3 import SMOLLM3
from compress.checkpoint.headers import Header
from compress.errors import UserError

_TEXT = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA3, GLM, GLM4, PHI3)
_VISION = (GLM4V, GLM4V_NATIVE, GLM46V, GLM46V_INTERLEAVED, QWEN2_5_VL, QWEN3_VL)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_TEXT, *_VISION)}
TRACER = "compress.trace"  # it works with families, so it stands above; imported for what nobody described
FLAVOURS = (PORTABLE, NATIVE)

__all__ = ["FAMILIES", "FLAVOURS", "SAME", "Cut", "Family", "Group", "Rewrite", "Sizes", "described", "family_of"]


def family_of(header: Header) -> Family:
    """The family that a checkpoint's config.json describes, or that its stock model shows; UserError for neither."""
    return described(header.config)


def described(config: Mapping[str, Any]) -> Family:
    """The family that a raw config.json describes. One that nobody described is traced, which imports torch, once for a
    config; UserError for what cannot be proved, and for what stock transformers does not know."""
    found = config.get("model_type")
    same = [family for family in FAMILIES.values() if family.model_type == found]
    if not same:
        known = tuple(dict.fromkeys(family.model_type for family in FAMILIES.values()))
        traced: Family = import_module(TRACER).traced(config, known)
        return traced
    reasons = [family.unlike(config) for family in same]
    for family, reason in zip(same, reasons, strict=True):
        if reason is None:
            return family
    raise UserError(f"config.json: {reasons[0]}")
