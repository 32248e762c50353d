"""Layouts on disk, one file each: names, planned shapes, codec both ways, config. Torch-free to import.

To add a format: one file with a `Format` beside this one and one entry in `FORMATS`; tests/unit/test_formats.py then
checks its codec, its bytes and its reload in stock transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import Header
from compress.errors import UserError, did_you_mean
from compress.formats.bnb_int8 import BNB_INT8
from compress.formats.compressed_tensors import PACKED, W8A16_FORMAT, WEIGHTS
from compress.formats.format import Format, decoder_linears, row_blocks
from compress.formats.plain import BF16, FP16, PLAIN, Plain

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Reader
    from compress.stream.forward import Stream

FORMATS: dict[str, Format] = {format.name: format for format in (BF16, FP16, BNB_INT8, W8A16_FORMAT)}
ALIASES = {"int8": "bnb-int8"}

__all__ = [
    "ALIASES",
    "FORMATS",
    "PLAIN",
    "Format",
    "Plain",
    "decoder_linears",
    "format_named",
    "format_of",
    "is_quantized",
    "open_stream",
    "row_blocks",
]


def format_named(name: str) -> Format:
    """The format a recipe names; UserError with the nearest name otherwise."""
    found = FORMATS.get(ALIASES.get(name, name))
    if found is None:
        raise UserError(f"format {name!r} is not known{did_you_mean(name, [*FORMATS, *ALIASES])}")
    return found


def is_quantized(header: Header) -> bool:
    """Whether config.json names a quantization, of ours or not."""
    return bool(header.config.get("quantization_config") or header.config.get("compression_config"))


def format_of(header: Header) -> Format:
    """The format a checkpoint is stored in, from its config.json; UserError for one that is not ours to read."""
    found = header.config.get("quantization_config") or header.config.get("compression_config")
    if not found:
        return PLAIN
    if not isinstance(found, Mapping):
        raise UserError(f"config.json: quantization_config must be an object, found {type(found).__name__}")
    method = found.get("quant_method")
    if method == "bitsandbytes" and found.get("load_in_8bit") is True and not found.get("load_in_4bit"):
        return BNB_INT8
    if method == "compressed-tensors" and _is_w8a16(found):
        return W8A16_FORMAT
    detail = " in a scheme other than 8-bit" if method == "bitsandbytes" else ""
    detail = f" other than {PACKED}, 8 bits, symmetric, per channel" if method == "compressed-tensors" else detail
    raise UserError(
        f"config.json: quantization_config with quant_method {method!r}{detail} is not supported",
        hint=f"start from the plain checkpoint; formats read here: {', '.join(FORMATS)}",
    )


def open_stream(reader: Reader, dtype: torch.dtype) -> Stream:
    """The streaming executor of a checkpoint in whatever family and format its config.json names."""
    from compress.arch import family_of
    from compress.stream.forward import Stream

    return Stream(reader, family_of(reader.header), dtype=dtype, linear=format_of(reader.header).load)


def _is_w8a16(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return False
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or group.get("input_activations") is not None:
            return False
        said = {"type": "int", "symmetric": True, "dynamic": False, **weights}  # compressed-tensors' own defaults
        if any(said.get(key) != value for key, value in WEIGHTS.items()):
            return False
        if (group.get("format") or config.get("format")) != PACKED:
            return False
    return True
