"""A small instance of a model: the same class, few layers, small sizes, weights of realistic spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress.checkpoint.stock import stock_class
from compress.errors import UserError
from compress.stream.stock import attention_of, quiet, stock_config, stock_model
from compress.trace import Unproved

VOCAB = 96
WINDOW = 16  # tokens of a sliding window, if there is one: fewer than the proof's text has
DEEPEST = 8  # layers of a small instance, when its first layers are of several kinds
FFN = 80


def check_class(config: Mapping[str, Any]) -> None:
    """Refuse what is no text decoder by its config alone."""
    kind = stock_class(config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])
    allowed = (causal,) if isinstance(causal, str) else tuple(causal or ())
    if kind.__name__ not in allowed:
        raise Unproved(
            f"{kind.__name__} is not the causal language model of its model_type"
            + (f", which is {' or '.join(allowed)}" if allowed else "; there is none")
        )
    if isinstance(config.get("text_config"), Mapping):
        raise Unproved("its decoder is one part of several, and none of those is traced")


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that the stock class makes of a raw config, under the names that most configs have."""
    made = stock_config({key: value for key, value in config.items() if key != "quantization_config"})
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    found: dict[str, Any] = {name: getattr(made, name, None) for name in names}
    if not all(type(value) is int and value > 0 for value in found.values()):
        raise Unproved(f"its config has no {next(n for n in names if type(found[n]) is not int or found[n] <= 0)}")
    heads = found["num_attention_heads"]
    kv_heads, head_dim = getattr(made, "num_key_value_heads", None), getattr(made, "head_dim", None)
    found["num_key_value_heads"] = kv_heads if type(kv_heads) is int and kv_heads > 0 else heads
    found["head_dim"] = head_dim if type(head_dim) is int and head_dim > 0 else found["hidden_size"] // heads
    found["tie_word_embeddings"] = bool(getattr(made, "tie_word_embeddings", False))
    return found


def key_of(config: Mapping[str, Any], name: str) -> str:
    """What a raw config calls `name` (`hidden_size` is `n_embd` in some)."""
    renamed: Mapping[str, str] = getattr(type(stock_config(config)), "attribute_map", {})
    return renamed.get(name, name)


def smaller(config: Mapping[str, Any]) -> dict[str, Any]:
    """The raw config with small sizes. The width of a head stays, so that whatever its rotation says of it holds; a KV
    head has 4 query heads at most, because what is coupled does not depend on how many there are."""
    sizes = read(config)
    heads, kv_heads, head_dim = (sizes[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    groups = min(2, kv_heads)
    few = groups * min(max(heads // kv_heads, 1), 4) if kv_heads < heads else min(heads, 4)
    hidden = few * (head_dim if sizes["hidden_size"] == heads * head_dim else 16)
    layers = _layers(config, sizes["num_hidden_layers"])
    changes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": few,
        "vocab_size": VOCAB,
    }
    made = stock_config(config)
    said = made.to_dict()
    if "num_key_value_heads" in said:
        changes["num_key_value_heads"] = groups if kv_heads < heads else few
    if "head_dim" in said:
        changes["head_dim"] = head_dim
    if type(getattr(made, "intermediate_size", None)) is int:
        changes["intermediate_size"] = FFN
    if type(getattr(made, "sliding_window", None)) is int:
        changes["sliding_window"] = WINDOW
    named = {key_of(config, key): value for key, value in changes.items()}
    deep = sizes["num_hidden_layers"]
    lists = {
        k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == deep and k != "architectures"
    }
    marks = ("pad_token_id", "bos_token_id", "eos_token_id")
    tokens = {key: index for index, key in enumerate(marks) if config.get(key) is not None or key in said}
    return {**config, **lists, **named, **tokens}


def _layers(config: Mapping[str, Any], deep: int) -> int:
    """How many of the first layers show every kind that there is, two at least."""
    kinds = getattr(stock_config(config), "layer_types", None)
    if not isinstance(kinds, list) or len(kinds) != deep:
        return min(deep, 2)
    found = max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))
    if found > DEEPEST:
        raise Unproved(f"the first {DEEPEST} of its layers are not of all kinds that layer_types names")
    return min(deep, found)


@torch.no_grad()
def instance(config: Mapping[str, Any]) -> nn.Module:
    """The model of a small config, in float32, with random weights: a few input channels are large, norms near 1."""
    kind = stock_class(config)
    try:
        with quiet():
            made = stock_config(config)
            made._attn_implementation = attention_of(kind)
            model: nn.Module = kind(made).eval()
    except UserError:
        raise
    except Exception as error:
        raise Unproved(f"a small instance of it cannot be built: {_one_line(error)}") from None
    generator = torch.Generator().manual_seed(0)
    for _, value in sorted(model.named_parameters()):
        if value.ndim < 2:
            value.copy_((value.mean() if value.numel() else 0.0) + 0.1 * torch.randn(value.shape, generator=generator))
        else:
            spread = torch.exp(0.5 * torch.randn(value.shape[-1], generator=generator))
            value.copy_(torch.randn(value.shape, generator=generator) * spread / value[0].numel() ** 0.5)
    return model


def meta(config: Mapping[str, Any]) -> nn.Module:
    """The stock model of a raw config, on the meta device."""
    return stock_model(config)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
