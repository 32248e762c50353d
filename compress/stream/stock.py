"""Stock transformers: the class that a config.json names, built on the meta device, and silence while it works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.checkpoint.stock import stock_class
from compress.data.quiet import quiet as silence
from compress.errors import UserError


def stock_config(config: Mapping[str, Any]) -> Any:
    """The stock config object of a raw config.json; UserError for what its class refuses."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    except Exception as error:  # strict dataclass validation: one type of its own per version
        raise UserError(f"config.json: stock transformers refuses it: {_one_line(error)}") from error


def stock_model(config: Mapping[str, Any]) -> nn.Module:
    """The stock transformers model of a raw config.json, on the meta device, in eval mode."""
    kind = stock_class(config)
    with quiet():
        found = stock_config({key: value for key, value in config.items() if key != "quantization_config"})
        found._attn_implementation = attention_of(kind)
        try:
            with torch.device("meta"):
                model: nn.Module = kind(found)
        except Exception as error:  # an activation or rope type that does not exist, and what else a config can say
            raise UserError(f"config.json: stock transformers cannot build it: {_one_line(error)}") from error
    return model.eval()


def attention_of(kind: Any) -> str:
    """How a stock class computes attention here: sdpa, or eager where it has no other."""
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"


@contextmanager
def quiet() -> Iterator[None]:
    """While open, no bars and no advice of transformers between our own lines; what was set before comes back.

    Loaders of quantized checkpoints draw bars of their own, past transformers' switch: tqdm itself is turned off.
    Errors still raise.
    """
    from transformers.utils import logging as untyped

    logging: Any = untyped
    bars = logging.is_progress_bar_enabled()
    with silence(logging):
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
