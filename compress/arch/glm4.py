"""GLM-4-0414 and GLM-Z1 (`glm4`): a glm with two more norms, behind attention and FFN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.family import Sizes
from compress.arch.glm import GLM, biased
from compress.arch.layer import QKV, SANDWICH, decoder_layer


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return decoder_layer(sizes, biases=QKV if biased(config) else (), norms=SANDWICH, fused_ffn=True)


GLM4 = replace(GLM, name="glm4", model_type="glm4", architecture="Glm4ForCausalLM", layer=_layer)
