"""SmolLM3: a llama, biases by the same keys, of which some layers do not rotate (no_rope_layers).

Which ones is the stock layer's own affair: it is handed the rotary embedding and leaves it aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.arch.llama import LLAMA
from compress.arch.refusals import masked_attention, no_null, switched_window


def _unlike(config: Mapping[str, Any]) -> str | None:
    return masked_attention(config, switched_window(config, None)) or no_null(config, "head_dim")


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    refuse=lambda sizes, config: None,
    rewrites=(),
    unlike=_unlike,
    vllm=None,
    defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
)
