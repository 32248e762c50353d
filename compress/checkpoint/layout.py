"""How planned tensors are laid out in safetensors files: known from the plan, before a weight is read. Torch-free."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.checkpoint.headers import DTYPE_BYTES, SINGLE, TensorSpec

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Shard:
    """One planned safetensors file: its tensors in disk order and the bytes of its header."""

    name: str
    tensors: tuple[TensorSpec, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def layout(tensors: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Assign tensors to shards of at most `shard_bytes` (one larger tensor gets a shard of its own).

    Within a shard, wide dtypes come first, as the safetensors library writes them: every tensor stays aligned.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))


def _shard(name: str, tensors: list[TensorSpec]) -> Shard:
    ordered = sorted(tensors, key=lambda t: -DTYPE_BYTES[t.dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in ordered:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(name, tuple(ordered), struct.pack("<Q", len(text)) + text)


def files_bytes(tensors: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES) -> int:
    """Bytes of all safetensors files that hold `tensors`, headers included: exactly what the writer writes."""
    return sum(shard.nbytes for shard in layout(tensors, shard_bytes))
