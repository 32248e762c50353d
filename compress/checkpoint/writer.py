"""Write a checkpoint folder: all headers first, then tensors in any order, then one rename.

The shapes are planned before a weight is read, so every tensor's place is known from the start: files are laid out
from the plan and filled by positioned writes, in whatever order a streaming step produces its tensors; a thread writes
while the next ones are made, so a tensor that was given must not change afterwards. Nothing of
`target` exists until everything was written, synced and renamed; on any error the partial folder is removed, unless
it is kept for a run that goes on from it (ledger.py says from where).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Any

import torch

from compress.checkpoint import per_layer
from compress.checkpoint.disk import disk_errors, sync
from compress.checkpoint.headers import INDEX, TensorSpec
from compress.checkpoint.layout import SHARD_BYTES, Shard, layout
from compress.checkpoint.reader import Reader, spec_of
from compress.errors import SelfCheckError
from compress.limits import BEHIND

FLUSH = 256 * 2**20  # bytes

# What a checkpoint folder holds besides weights and config.json and must keep: tokenizer, processor, templates, legal.
CARRIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)


class Writer:
    """`with Writer(target, tensors) as w: w.config(...); w.put(name, tensor) ...`: a whole folder, or none."""

    def __init__(
        self, target: Path, tensors: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES, *, keep: bool = False
    ) -> None:
        """`keep`: leave the partial folder on an error, and go on from one that was left with the same layout."""
        self.target, self._keep = target, keep
        self.partial = target.with_name(target.name + ".partial")
        self._shards = layout(tensors, shard_bytes)
        self._places: dict[str, tuple[TensorSpec, Shard, int]] = {}
        for shard in self._shards:
            offset = len(shard.header)
            for spec in shard.tensors:
                self._places[spec.name] = (spec, shard, offset)
                offset += spec.nbytes
        self._missing = set(self._places)
        self.kept = False  # whether it goes on from a partial folder that was left
        self._rows: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._behind = _Behind()

    def __enter__(self) -> Writer:
        kept = self._keep and all(_starts_with(self.partial / shard.name, shard.header) for shard in self._shards)
        self.kept = kept
        if self.partial.exists() and not kept:
            shutil.rmtree(self.partial)
        try:
            with disk_errors(self.partial):
                self.partial.mkdir(parents=True, exist_ok=kept)
                for shard in self._shards:
                    how = os.O_RDWR if kept else os.O_RDWR | os.O_CREAT | os.O_EXCL
                    descriptor = os.open(self.partial / shard.name, how, 0o666)
                    self._files[shard.name] = descriptor
                    if not kept:
                        _pwrite(descriptor, shard.header, 0)
        except BaseException:
            self._close(remove=not self._keep)
            raise
        return self

    def resume(self, names: Iterable[str]) -> None:
        """These tensors are in the kept partial folder already."""
        for name in names:
            self._place(name)
            self._missing.discard(name)

    @property
    def written(self) -> frozenset[str]:
        """Names of the tensors that are complete."""
        return frozenset(self._places.keys() - self._missing)

    def sync(self) -> None:
        """All that was written so far reaches the disk."""
        with disk_errors(self.partial):
            self._behind.wait()
            for descriptor in self._files.values():
                os.fsync(descriptor)
            sync(self.partial)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close(remove=not self._keep)

    def _close(self, remove: bool) -> None:
        """Close all files; remove the partial folder, which is gone already when all went well."""
        self._behind.stop()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if remove and self.partial.exists():
            shutil.rmtree(self.partial)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Write one whole tensor; name, dtype and shape must be the planned ones."""
        spec, _, _ = self._place(name)
        if spec_of(name, value) != spec:
            raise SelfCheckError(f"planned {spec}, but the step made {spec_of(name, value)}")
        self._write(name, 0, value)
        self._missing.discard(name)

    def put_rows(self, name: str, start: int, value: torch.Tensor) -> None:
        """Write rows [start, start + len(value)) of one tensor; the blocks come in order and leave no gap."""
        spec, _, _ = self._place(name)
        if not value.ndim or spec_of(name, value) != TensorSpec(name, spec.dtype, (len(value), *spec.shape[1:])):
            raise SelfCheckError(f"planned rows of {spec}, but the step made {spec_of(name, value)}")
        stop = start + len(value)
        if start != self._rows.get(name, 0) or stop > spec.shape[0]:
            raise SelfCheckError(
                f"rows {start}..{stop} of '{name}' are out of turn ({self._rows.get(name, 0)} written)"
            )
        self._write(name, start * (spec.nbytes // max(spec.shape[0], 1)), value)
        self._rows[name] = stop
        if stop == spec.shape[0]:
            self._missing.discard(name)

    def copy(self, reader: Reader, name: str) -> None:
        """Copy one tensor unchanged, in pieces."""
        spec, _, _ = self._place(name)
        if reader.spec(name) != spec:
            raise SelfCheckError(f"planned {spec}, but the source holds {reader.spec(name)}")
        done = 0
        for piece in reader.chunks(name):
            self._write(name, done, piece)
            done += piece.nbytes
        self._missing.discard(name)

    def text(self, name: str, content: str) -> None:
        """A small text file beside the weights."""
        self.file(name, content.encode())

    def file(self, name: str, content: bytes) -> None:
        """A small file beside the weights; `name` may have a folder."""
        with disk_errors(self.partial):
            (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            (self.partial / name).write_bytes(content)

    def config(self, config: Mapping[str, Any], source: Path) -> None:
        """config.json (the source's own bytes when nothing changed), and where layers differ the code that loads."""
        if per_layer.is_per_layer(config):
            self.text(per_layer.FILE, per_layer.source(per_layer.stock_name(config["architectures"][0])))
        original = source / "config.json"
        if original.exists() and json.loads(original.read_text(encoding="utf-8")) == config:
            self.text("config.json", original.read_text(encoding="utf-8"))
        else:
            self.text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def carry(self, source: Path) -> None:
        """Copy tokenizer, processor, chat template, generation config, licence and notices of `source`."""
        names = sorted({p.name for pattern in CARRIED for p in source.glob(pattern) if p.is_file()})
        with disk_errors(self.partial):
            for name in names:
                shutil.copyfile(source / name, self.partial / name)

    def _place(self, name: str) -> tuple[TensorSpec, Shard, int]:
        if name not in self._places:
            raise SelfCheckError(f"the step made a tensor that was not planned: '{name}'")
        return self._places[name]

    def _write(self, name: str, start: int, value: torch.Tensor) -> None:
        _, shard, offset = self._place(name)
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with disk_errors(self.partial):
            view = memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs for 3.11 lack Buffer
            self._behind.write(self._files[shard.name], view, offset + start)

    def _finish(self) -> None:
        if self._missing:
            raise SelfCheckError(f"{len(self._missing)} planned tensors were not written, first '{min(self._missing)}'")
        with disk_errors(self.partial):
            self._behind.wait()
            if len(self._shards) > 1:
                weight_map = {t.name: s.name for s in self._shards for t in s.tensors}
                total = sum(t.nbytes for s in self._shards for t in s.tensors)
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                self.text(INDEX, json.dumps(index, indent=2) + "\n")
            for path in sorted(self.partial.rglob("*")):
                if path.is_file():
                    sync(path)
            sync(self.partial)
            os.rename(self.partial, self.target)
            sync(self.target.parent)


class _Behind:
    """Writes in a thread of its own, in the order given, while the caller makes what comes next.

    At most BEHIND bytes wait; what is larger is written at once. Every FLUSH bytes another thread begins to bring them
    to the disk, so that the last sync has little left. An error is raised by the next call.
    """

    def __init__(self) -> None:
        self._room = Condition()
        self._waiting: deque[tuple[int, memoryview, int]] = deque()
        self._bytes = 0  # of what waits, and of what is being written
        self._error: OSError | None = None
        self._thread: Thread | None = None
        self._dirty = 0
        self._flushing: Thread | None = None

    def write(self, descriptor: int, data: memoryview, offset: int) -> None:
        """Write `data`, which must not change until it is written, at `offset`."""
        if len(data) > BEHIND:
            self.wait()
            self._write(descriptor, data, offset)
            return
        with self._room:
            self._room.wait_for(lambda: self._bytes + len(data) <= BEHIND or self._error is not None)
            self._raise()
            self._waiting.append((descriptor, data, offset))
            self._bytes += len(data)
            if self._thread is None:
                thread = Thread(target=self._run, name="writing", daemon=True)
                thread.start()
                self._thread = thread  # one that could not start is not waited for
            self._room.notify_all()

    def wait(self) -> None:
        """Until all is written."""
        with self._room:
            self._room.wait_for(lambda: self._bytes == 0 or self._error is not None)
            self._raise()

    def stop(self) -> None:
        """Drop what waits, and end the thread: afterwards nothing is written any more."""
        with self._room:
            self._waiting.clear()
            writing, self._thread = self._thread, None
            self._room.notify_all()
        if writing is not None:
            writing.join()  # only then no other flush can begin
        if self._flushing is not None:
            self._flushing.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: OSError) -> None:
        with self._room:
            self._error = self._error or error
            self._waiting.clear()
            self._room.notify_all()

    def _write(self, descriptor: int, data: memoryview, offset: int) -> None:
        _pwrite(descriptor, data, offset)
        self._dirty += len(data)
        if self._dirty >= FLUSH and (self._flushing is None or not self._flushing.is_alive()):
            self._dirty = 0
            self._flushing = Thread(target=self._flush, args=(descriptor,), name="flushing", daemon=True)
            self._flushing.start()

    def _flush(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            self._fail(error)

    def _run(self) -> None:
        while True:
            with self._room:
                self._room.wait_for(lambda: self._waiting or self._thread is None)
                if not self._waiting:
                    return
                descriptor, data, offset = self._waiting.popleft()
            try:
                self._write(descriptor, data, offset)
            except OSError as error:
                self._fail(error)
            with self._room:
                self._bytes = self._bytes - len(data) if self._error is None else 0
                self._room.notify_all()


def _starts_with(path: Path, header: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return handle.read(len(header)) == header


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
