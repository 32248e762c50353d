"""Llama and everything that carries its model_type (SmolLM2, TinyLlama, Yi ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.arch.family import Family, Group, Rewrite, Sizes
from compress.arch.layer import QKVO, decoder_layer, ffn_split, query_heads
from compress.arch.rope import HALF_SPLIT

# Keys that a llama may leave out and for which MistralConfig fills in another value: llama's are written out.
DEFAULTS = {"max_position_embeddings": 2048}
BIASES = ("attention_bias", "mlp_bias")


def _biases(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The Linears of a layer that have a bias by the keys of a llama."""
    ffn = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return (*(QKVO if config.get("attention_bias") else ()), *(ffn if config.get("mlp_bias") else ()))


def _layer(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return decoder_layer(sizes, biases=_biases(config))


def _groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
    return (
        query_heads(sizes, bias=bool(config.get("attention_bias"))),
        ffn_split(sizes, bias=bool(config.get("mlp_bias"))),
    )


def dividing(sizes: Sizes, family: str) -> str | None:
    """Why a stock class that wants heads to divide hidden_size, whatever head_dim says, does not load `sizes`."""
    if sizes.hidden % sizes.heads:
        fits = [n for n in range(sizes.kv_heads, sizes.hidden + 1, sizes.kv_heads) if sizes.hidden % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - sizes.heads))[:2])
        does = f"; {' and '.join(map(str, near))} {'do' if len(near) > 1 else 'does'}" if near else ""
        return (
            f"stock transformers loads a {family} only if its heads divide hidden_size: {sizes.heads} does not divide "
            f"{sizes.hidden}{does}"
        )
    return None


def _as_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in (*BIASES, "pretraining_tp", "auto_map")}
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return {**DEFAULTS, **kept, **changes}


def _biased(config: Mapping[str, Any]) -> str | None:
    found = [key for key in BIASES if config.get(key)]
    return f"mistral, the class that would take them, has no biases, and {found[0]} is true" if found else None


MISTRAL_LABEL = Rewrite(
    flavour=None,
    config=_as_mistral,
    refuse=_biased,
    why="mistral is the same block and takes any number of heads",
)

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    text="model",
    head="lm_head",
    rope=HALF_SPLIT,
    layer=_layer,
    groups=_groups,
    # LlamaConfig.validate_architecture: hidden_size % num_attention_heads must be 0
    refuse=lambda sizes, config: dividing(sizes, "llama"),
    skip=("lm_head",),
    layered=True,
    rewrites=(MISTRAL_LABEL,),
    vllm="its own class",
)
