"""What a text config can say that no stock class or no executor takes, in words. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MASKS = ("full_attention", "sliding_attention")


def masked_attention(config: Mapping[str, Any], window: Any) -> str | None:
    """Why a layer of the config's `layer_types` is more than attention under a mask, which the executor takes from the
    stock model; None where all are, or none is named. `window`: what the stock class takes for sliding_window."""
    named = config.get("layer_types")
    if not isinstance(named, list):
        return None
    others, family = [kind for kind in named if kind not in MASKS], config.get("model_type")
    if others:
        return f"a {family} with {others[0]!r} in layer_types is not supported; allowed: {', '.join(MASKS)}"
    if "sliding_attention" in named and window is None:
        return f"layer_types holds 'sliding_attention', but this {family} has no sliding_window"
    return None


def switched_window(config: Mapping[str, Any], default: int | None = 4096) -> Any:
    """The window of a family that has one where use_sliding_window is true."""
    return config.get("sliding_window", default) if config.get("use_sliding_window") else None


def no_null(config: Mapping[str, Any], *keys: str) -> str | None:
    """Why a stock class that reads `keys` as they stand cannot take a config: one of them is null."""
    for key in keys:
        if key in config and config[key] is None:
            return f"a {config.get('model_type')} cannot have a {key} of null: leave the key out, or give a number"
    return None
