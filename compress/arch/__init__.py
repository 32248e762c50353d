"""What differs between model families, as data: where the decoder sits, its tensors, and what can be cut from it.

To add a family: one file with a `Family` beside this one, one entry in `FAMILIES`, and a pico model in
tests/tiny.py. Nothing here imports torch.
"""

from __future__ import annotations

from compress.arch.family import Cut, Family, Group, Sizes
from compress.arch.glm4v import GLM4V
from compress.arch.llama import LLAMA
from compress.checkpoint.headers import Header
from compress.errors import UserError, did_you_mean

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, GLM4V)}

__all__ = ["FAMILIES", "Cut", "Family", "Group", "Sizes", "family_of"]


def family_of(header: Header) -> Family:
    """The family that config.json names; UserError for one nobody described."""
    found = header.config.get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        raise UserError(f"config.json: model_type {found!r} is not supported{did_you_mean(str(found), FAMILIES)}")
    return FAMILIES[found]
