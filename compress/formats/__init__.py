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
from compress.formats.compressed_tensors import W8A8_FORMAT, W8A16_FORMAT
from compress.formats.format import Format, decoder_linears, row_blocks
from compress.formats.plain import BF16, FP16, PLAIN, Plain

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.reader import Reader
    from compress.stream.forward import Stream

FORMATS: dict[str, Format] = {format.name: format for format in (BF16, FP16, BNB_INT8, W8A16_FORMAT, W8A8_FORMAT)}
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
    known = [how for how in FORMATS.values() if how.method and how.method == method]
    for how in known:
        if how.describes(found):
            return how
    detail = f" in a scheme other than {' or '.join(how.scheme for how in known)}" if known else ""
    raise UserError(
        f"config.json: quantization_config with quant_method {method!r}{detail} is not supported",
        hint=f"start from the plain checkpoint; formats read here: {', '.join(FORMATS)}",
    )


def open_stream(reader: Reader, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> Stream:
    """The streaming executor of a checkpoint in whatever family and format its config.json names; `config` replaces
    that one, for fewer layers."""
    from compress.arch import family_of
    from compress.stream.forward import Stream

    return Stream(reader, family_of(reader.header), dtype=dtype, linear=format_of(reader.header).load, config=config)
