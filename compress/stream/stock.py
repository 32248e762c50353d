"""Stock transformers: the class that a config.json names, built on the meta device, and silence while it works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress.arch import Family
from compress.checkpoint import per_layer
from compress.checkpoint.headers import Header
from compress.checkpoint.stock import stock_class
from compress.data.quiet import quiet as silence
from compress.errors import UserError
from compress.stream.arranged import stock_view


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


def told(family: Family, header: Header) -> Header:
    """`header` with the lists in its config that the stock class would derive, where they do not say the same of every
    layer: of fewer layers another list would be derived."""
    stock: Any = stock_config(stock_view(family, header.config)[0]).get_text_config(decoder=True)
    derived = per_layer.lists(stock.to_dict(), family.sizes(header).layers)
    missing = {
        key: said
        for key, said in derived.items()
        if header.text_config.get(key) is None and any(each != said[0] for each in said)
    }
    return replace(header, config=family.with_units(header.config, missing))


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
