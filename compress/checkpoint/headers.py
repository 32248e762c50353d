"""What a checkpoint folder says about itself, read from config.json and the safetensors headers alone.

Nothing here imports torch or reads a weight, so a plan of a 20 GB folder takes milliseconds. Every path named in an
index is checked to lie in the folder: paths in files are never trusted.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UserError

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
MAX_HEADER = 100_000_000  # the bound the safetensors library uses as well
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype (`BF16`, `F32` ...) and shape of one tensor on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.parameters * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes lie: file and absolute offset."""

    file: Path
    offset: int


@dataclass(frozen=True)
class Header:
    """A checkpoint as a plan sees it: the parsed config.json and every tensor, in the order they lie on disk.

    `locations` is empty for a checkpoint that does not exist yet (the planned output of a step).
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    locations: Mapping[str, Location]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (the files add their headers)."""
        return sum(t.nbytes for t in self.tensors.values())

    def stored_bytes(self) -> int:
        """Bytes of the files that hold the tensors, as they lie on disk: headers included."""
        return sum(file.stat().st_size for file in {where.file for where in self.locations.values()})

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The decoder's sizes: `text_config` of a multimodal config, else the config itself."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @property
    def dtype(self) -> str:
        """The floating dtype that holds most bytes."""
        totals: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in ("F16", "BF16", "F32", "F64"):
                totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
        return max(totals, key=lambda name: totals[name]) if totals else "F32"

    def planned(self, config: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> Header:
        """The header of a step's output."""
        return Header(config=config, tensors={t.name: t for t in tensors}, locations={})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; a UserError that names the file where it is absent or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number too long
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_header(folder: Path) -> Header:
    """Read config.json and all safetensors headers of `folder`.

    Raises UserError for: no folder, no config, no safetensors (with a word on pickles), a missing or truncated shard,
    a header that the safetensors library would not take, tensors that overlap or leave bytes between them, a tensor in
    two shards, an index that names a path outside the folder or a tensor that its shard lacks. Where model.safetensors
    and an index both stand, the single file is the checkpoint and the index is not read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    weight_map = _weight_map(folder)
    tensors: dict[str, TensorSpec] = {}
    locations: dict[str, Location] = {}
    for file in _shard_files(folder, weight_map):
        for spec, offset in read_shard_header(file):
            if spec.name in tensors:
                raise UserError(f"{file}: tensor '{spec.name}' stands in {locations[spec.name].file.name} as well")
            tensors[spec.name] = spec
            locations[spec.name] = Location(file, offset)
    for name, shard in weight_map.items():
        if name not in locations or locations[name].file.name != shard:
            raise UserError(f"{folder / INDEX}: says that {name!r} is in {shard}, which does not hold it")
    return Header(config=config, tensors=tensors, locations=locations)


def read_shard_header(file: Path) -> list[tuple[TensorSpec, int]]:
    """(spec, absolute offset) of every tensor of one safetensors file, in offset order; bounds are checked."""
    try:
        size = file.stat().st_size
        if not file.is_file():  # to open a pipe would wait for ever
            raise UserError(f"{file}: not a file")
        with file.open("rb") as handle:
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise UserError(f"{file}: truncated (a safetensors file begins with 8 bytes of header length)")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(MAX_HEADER, size - 8):
                raise UserError(f"{file}: truncated or not safetensors (header of {length} bytes in {size})")
            raw = handle.read(length)
    except FileNotFoundError:
        raise UserError(f"{file}: missing shard") from None
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror})") from None
    try:
        entries = _parsed(raw)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number too long, our own words
        raise UserError(f"{file}: broken safetensors header ({error})") from None
    found = [_entry(file, name, value, 8 + length) for name, value in entries.items()]
    found.sort(key=lambda pair: (pair[1], pair[0].nbytes))
    _check_offsets(file, found, 8 + length, size)
    return found


def _parsed(raw: bytes) -> dict[str, Any]:
    """The tensors of a header's JSON, read no more leniently than the safetensors library reads it; else ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def whole(text: str) -> int | float:
        return float(text) if text == "-0" else int(text)  # the library takes -0 for a float

    entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
    if not isinstance(entries, dict):
        raise ValueError("not a JSON object")
    json.dumps(entries, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    metadata = entries.pop("__metadata__", None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise ValueError("__metadata__ is no map of text to text")
    return entries


def _entry(file: Path, name: str, value: Any, base: int) -> tuple[TensorSpec, int]:
    """One tensor and its absolute offset; UserError for what the library would refuse, and for names of two lines."""
    tensor = f"{file}: tensor {name!r}"
    if not name.isprintable():
        raise UserError(f"{tensor} has a name that cannot be printed")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{tensor} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UserError(f"{tensor} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise UserError(f"{tensor} must have a list of sizes and two offsets")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        raise UserError(f"{tensor} has sizes or offsets that are not whole numbers below 2^63")
    spec = TensorSpec(name, dtype, tuple(shape))
    if math.prod(n for n in shape if n) >= 2**60:  # before zero makes it nothing: the library would overflow
        raise UserError(f"{tensor} has the absurd shape {shape}")
    if offsets[1] - offsets[0] != spec.nbytes:
        raise UserError(f"{tensor} of shape {shape} needs {spec.nbytes} bytes, has {offsets[1] - offsets[0]}")
    return spec, base + offsets[0]


def _check_offsets(file: Path, found: Iterable[tuple[TensorSpec, int]], start: int, size: int) -> None:
    """Every byte behind the header (it ends at `start`) belongs to one tensor, as the library wants it."""
    end, before = start, "the header"
    for spec, offset in found:
        if offset < end:
            raise UserError(f"{file}: tensor '{spec.name}' overlaps {before}")
        if offset > end:
            raise UserError(f"{file}: {offset - end} bytes between {before} and tensor '{spec.name}' belong to nothing")
        end, before = offset + spec.nbytes, f"tensor '{spec.name}'"
    if end != size:
        what = "truncated" if size < end else "trailing bytes"
        raise UserError(f"{file}: {what}: the header needs {end} bytes, the file has {size}")


def _shard_files(folder: Path, weight_map: Mapping[str, str]) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if weight_map:
        return [inside(folder, name, folder / INDEX) for name in sorted(set(weight_map.values()))]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise UserError(
            f"{folder}: only pickled weights ({pickles[0]}); pickles can run code and are not read",
            hint="convert it once with transformers: model.save_pretrained(DIR, safe_serialization=True)",
        )
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX}")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file as the index says it; empty when there is none, or a single file goes before it, as in stock
    transformers."""
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return {}
    said = read_json(index)
    weight_map = said.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: 'weight_map' is missing, empty or not a map of names to files")
    if not isinstance(said.get("metadata"), dict):
        raise UserError(f"{index}: 'metadata' is missing or not a map; stock transformers would not read the index")
    return weight_map


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """`folder / name`, refused when it would leave the folder (hub caches link files, so links are not followed)."""
    path = Path(name)
    if name != path.name or name in ("", "..") or not name.isprintable():
        raise UserError(f"{said_by}: names the path {name!r}, which is outside the folder or no file name")
    return folder / path
