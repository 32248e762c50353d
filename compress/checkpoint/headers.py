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
    an index that names a path outside the folder or a tensor its shard lacks. Where model.safetensors and an index both
    stand, the single file is the checkpoint and the index is not read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    files = _shard_files(folder)
    tensors: dict[str, TensorSpec] = {}
    locations: dict[str, Location] = {}
    for file in files:
        for spec, offset in read_shard_header(file):
            if spec.name in tensors:
                raise UserError(f"{file}: tensor '{spec.name}' stands in {locations[spec.name].file.name} as well")
            tensors[spec.name] = spec
            locations[spec.name] = Location(file, offset)
    _check_index(folder, locations)
    return Header(config=config, tensors=tensors, locations=locations)


def read_shard_header(file: Path) -> list[tuple[TensorSpec, int]]:
    """(spec, absolute offset) of every tensor of one safetensors file, in offset order; bounds are checked."""
    try:
        size = file.stat().st_size
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
        entries = json.loads(raw)
        found = [_entry(file, name, value, 8 + length) for name, value in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: broken safetensors header ({error})") from None
    found.sort(key=lambda pair: (pair[1], pair[0].nbytes))
    end = 8 + length
    for spec, offset in found:
        if offset != end:
            raise UserError(f"{file}: tensor '{spec.name}' does not start where the one before it ends")
        end = offset + spec.nbytes
    if end != size:
        what = "truncated" if size < end else "trailing bytes"
        raise UserError(f"{file}: {what}: the header needs {end} bytes, the file has {size}")
    return found


def _entry(file: Path, name: str, value: dict[str, Any], base: int) -> tuple[TensorSpec, int]:
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise UserError(f"{file}: tensor '{name}' has the unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise UserError(f"{file}: tensor '{name}' has sizes or offsets that are not whole numbers")
    spec = TensorSpec(name, dtype, tuple(shape))
    if stop - start != spec.nbytes:
        raise UserError(f"{file}: tensor '{name}' of shape {shape} needs {spec.nbytes} bytes, has {stop - start}")
    return spec, base + start


def _shard_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():  # before an index, as stock transformers does
        return [folder / SINGLE]
    index = folder / INDEX
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        return [inside(folder, name, index) for name in names]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise UserError(
            f"{folder}: only pickled weights ({pickles[0]}); pickles can run code and are not read",
            hint="convert it once with transformers: model.save_pretrained(DIR, safe_serialization=True)",
        )
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: 'weight_map' is missing, empty or not a map of names to files")
    return weight_map


def _check_index(folder: Path, locations: Mapping[str, Location]) -> None:
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return
    for name, shard in _weight_map(index).items():
        where = locations.get(name)
        if where is None or where.file.name != Path(shard).name:
            raise UserError(f"{index}: says that '{name}' is in {shard}, which does not hold it")


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """`folder / name`, refused when it would leave the folder (hub caches link files, so links are not followed)."""
    path = Path(name)
    if "\0" in name or path.is_absolute() or len(path.parts) != 1 or path.parts[0] in ("..", "."):
        raise UserError(f"{said_by}: names the path {name!r}, which is outside the folder")
    return folder / path
