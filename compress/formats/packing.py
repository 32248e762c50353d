"""The writing half of quantization, for every step that writes one: plain tensors in, stored tensors out.

A `Packer` packs the linears in blocks of rows, casts or copies the rest, and counts what rounding did. What it has
written of a layer it holds until `release`, so that `written` can be streamed before the folder exists.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

import torch

from compress.checkpoint.headers import Header, TensorSpec
from compress.checkpoint.reader import Reader, spec_of
from compress.checkpoint.writer import Writer
from compress.formats.format import Format, row_blocks
from compress.formats.plain import Plain
from compress.limits import PACKERS
from compress.machine import torch_threads

Work = Callable[[int, torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class Counts:
    """What rounding did so far: per kind of linear one relative Frobenius error a tensor; values that a cast to a
    narrower float turned into zero, or into subnormals, which hold fewer bits."""

    errors: dict[str, list[float]] = field(default_factory=dict)
    zero: int = 0
    subnormal: int = 0

    def __post_init__(self) -> None:
        self._lock = Lock()  # blocks are cast beside each other

    def cast(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count what a cast lost."""
        if before.dtype == after.dtype:
            return
        size = after.float().abs_()
        left = int(torch.count_nonzero(size))
        small = int(torch.count_nonzero(size < torch.finfo(after.dtype).smallest_normal))
        zero = int(torch.count_nonzero(before)) - left
        with self._lock:
            self.zero += zero
            self.subnormal += small - (size.numel() - left)


class Packer:
    """Writes plain tensors through `writer` as the format `how` stores them.

    `writer` is laid out for the header after, `linears` are the modules that the format packs (`decoder_linears`): the
    same that the header was planned with. Tensors come whole and in any order. A step that advances a probe does, for
    every layer:

        for name in ...:
            packer.put(prefix + name, value)        # or packer.take(reader, prefix + name)
        with stream.layer(index) as layer:          # stream = open_stream(packer.written(reader, after), torch.float32)
            stream.advance(layer, probe)
        packer.release()

    Up to `threads` blocks are packed beside each other, each by one thread: rows are independent, so the bytes are the
    same. UserError names a tensor that a narrower float cannot hold.
    """

    def __init__(self, writer: Writer, how: Format, linears: Collection[str], threads: int = 1) -> None:
        self.how, self._threads = how, min(threads, PACKERS)
        self._writer, self._linears = writer, frozenset(linears)
        self._held: dict[str, torch.Tensor] = {}
        self._counts = Counts()

    def put(self, name: str, value: torch.Tensor, *, hold: bool = True) -> None:
        """Write one tensor of the plain checkpoint, in the dtype that the plain checkpoint stores it in."""
        with torch_threads(1):
            self._put(name, value, hold)

    def _put(self, name: str, value: torch.Tensor, hold: bool) -> None:
        spec = spec_of(name, value)
        if not self._changes(spec):
            self._writer.put(name, value)
            stored = {name: value}
        elif not spec.shape or not spec.parameters:  # no rows
            stored = {name: self._cast(name, value)}
            self._writer.put(name, stored[name])
        else:
            stored = self._store(spec, (value[start:stop] for start, stop in _blocks(spec)), hold)
        self._held.update(stored if hold else {})

    def take(self, reader: Reader, name: str, *, hold: bool = True) -> None:
        """Write one tensor that `reader` holds; a few blocks of rows are in memory at once, beside what is held."""
        with torch_threads(1):
            self._take(reader, name, hold)

    def _take(self, reader: Reader, name: str, hold: bool) -> None:
        spec = reader.spec(name)
        if self._changes(spec) and spec.shape and spec.parameters:
            stored = self._store(spec, (reader.rows(name, slice(*block)) for block in _blocks(spec)), hold)
            self._held.update(stored)
        elif self._changes(spec) or hold:
            self._put(name, reader.tensor(name), hold)
        else:
            self._writer.copy(reader, name)

    def put_rows(self, name: str, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Write rows [start, start + len(rows)) of a tensor that is no linear, in order; returns them as stored."""
        value = self._cast(name, rows)
        self._writer.put_rows(name, start, value)
        return value

    def written(self, source: Reader, after: Header) -> Reader:
        """The checkpoint that is being written, to be streamed: what is held, and for the rest the tensors of `source`
        as they will be stored. `after`: the planned header. It opens no file of its own."""
        return _Written(source, after, self.how, self._held)

    def release(self) -> None:
        """Let go of what is held."""
        self._held.clear()

    def receipt(self) -> dict[str, Any]:
        """Format, number of linears, rounding errors by kind, and for a cast the values it lost."""
        counts = self._counts
        found: dict[str, Any] = {
            "format": self.how.name,
            "linears": len(self._linears),
            "rounding": {kind: _summary(counts.errors[kind]) for kind in sorted(counts.errors)},
        }
        if isinstance(self.how, Plain):
            found |= {"flushed_to_zero": counts.zero, "subnormal": counts.subnormal}
        return found

    def state(self) -> dict[str, Any]:
        """What `receipt` is made of so far, as JSON data: for a step that will go on in another process."""
        return asdict(self._counts)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._counts = Counts(**deepcopy(dict(state)))

    def _changes(self, spec: TensorSpec) -> bool:
        """Whether the format stores this tensor in another form than the plain checkpoint does."""
        stored = self.how.stored(spec) if self._module(spec.name) is not None else (self.how.kept(spec),)
        return stored != (spec,)

    def _module(self, name: str) -> str | None:
        """The linear whose weight `name` is."""
        module = name.removesuffix(".weight")
        return module if name.endswith(".weight") and module in self._linears else None

    def _cast(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor (or rows) that is no linear, as it is stored."""
        stored = self.how.cast(name, value)
        self._counts.cast(value, stored)
        return stored

    def _store(self, spec: TensorSpec, blocks: Iterable[torch.Tensor], hold: bool) -> dict[str, torch.Tensor]:
        """Write a tensor that changes, from its blocks of rows in order; returns all its stored tensors if `hold`."""
        module = self._module(spec.name)
        error = _Error(spec.shape[0])
        whole: dict[str, torch.Tensor] = {}

        def work(start: int, block: torch.Tensor) -> dict[str, torch.Tensor]:
            if module is None:
                return {spec.name: self._cast(spec.name, block)}
            return self._pack(module, start, block, error)

        for start, stored in _beside(work, blocks, self._threads):
            for key, value in stored.items():
                self._writer.put_rows(key, start, value)
                if hold:
                    _fill(whole, key, spec.shape[0], start, value)
        if module is not None:
            constants = self.how.constants(module, (spec.shape[0], spec.shape[1]))
            for key, value in constants.items():
                self._writer.put(key, value)
            whole |= constants if hold else {}
            self._counts.errors.setdefault(_kind(module), []).append(error.relative())
        return whole

    def _pack(self, module: str, start: int, rows: torch.Tensor, error: _Error) -> dict[str, torch.Tensor]:
        """The stored form of the rows of a linear from `start` on."""
        stored = self.how.pack_rows(module, rows)
        constants = self.how.constants(module, (rows.shape[0], rows.shape[1]))
        error.add(start, rows, self.how.unpack(module, stored | constants, torch.float32))
        if isinstance(self.how, Plain):
            self._counts.cast(rows, stored[f"{module}.weight"])
        return stored


class _Written(Reader):
    """See `Packer.written`."""

    def __init__(self, source: Reader, after: Header, how: Format, held: Mapping[str, torch.Tensor]) -> None:
        super().__init__(source.folder, after)
        self._source, self._how, self._held = source, how, held

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        value = self._held[name] if name in self._held else self._how.cast(name, self._source.tensor(name))
        return value if dtype is None else value.to(dtype)

    def rows(self, name: str, index: Sequence[int] | slice, dtype: torch.dtype | None = None) -> torch.Tensor:
        value = self._held[name][index] if name in self._held else self._how.cast(name, self._source.rows(name, index))
        return value if dtype is None else value.to(dtype)


class _Error:
    """Relative error of one tensor of `rows` rows in the Frobenius norm: the same whatever the blocks.

    A row's norm is taken in float32, whatever the threads, and the sum over rows in float64. The norms lie in two
    tensors made beforehand: small ones that stay, made between large ones that go, would fragment the heap.
    """

    def __init__(self, rows: int) -> None:
        self._norms, self._differences = torch.empty(rows), torch.empty(rows)

    def add(self, start: int, rows: torch.Tensor, restored: torch.Tensor) -> None:
        """The rows from `start` on, and what is restored of them, in float32; `restored` is overwritten."""
        wide = rows.float()
        part = slice(start, start + len(rows))
        self._norms[part] = torch.linalg.vector_norm(wide, dim=1)
        self._differences[part] = torch.linalg.vector_norm(restored.sub_(wide), dim=1)

    def relative(self) -> float:
        total, difference = (float(norms.double().square().sum()) for norms in (self._norms, self._differences))
        return (difference / total) ** 0.5 if total else 0.0


def _beside(work: Work, blocks: Iterable[torch.Tensor], threads: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(start, work(start, block)) of blocks of rows in their order, `threads` of them done beside each other."""
    done: deque[tuple[int, Future[dict[str, torch.Tensor]]]] = deque()
    start = 0
    with ThreadPoolExecutor(threads, "packing") as pool:
        try:
            for block in blocks:
                done.append((start, pool.submit(work, start, block)))
                start += len(block)
                if len(done) > threads:
                    first, future = done.popleft()
                    yield first, future.result()
            while done:
                first, future = done.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _blocks(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    return row_blocks(spec.shape[0], spec.parameters // max(spec.shape[0], 1))


def _fill(whole: dict[str, torch.Tensor], key: str, rows: int, start: int, value: torch.Tensor) -> None:
    """Put a block where it belongs in the tensor of `rows` rows that is held, made on first use."""
    if len(value) == rows:
        whole[key] = value
        return
    if key not in whole:
        whole[key] = torch.empty((rows, *value.shape[1:]), dtype=value.dtype, device=value.device)
    whole[key][start : start + len(value)] = value


def _kind(module: str) -> str:
    """`model.layers.3.mlp.down_proj` -> `mlp.down_proj`."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[1]


def _summary(errors: list[float]) -> dict[str, Any]:
    return {
        "tensors": len(errors),
        "mean_relative_error": _digits(sum(errors) / len(errors)),
        "max_relative_error": _digits(max(errors)),
    }


def _digits(value: float) -> float:
    # sums may differ in their last bits from machine to machine; the receipt must not
    return float(f"{value:.6g}")
