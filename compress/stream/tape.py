"""The inputs of all layers, which a backward pass needs in reverse: in memory, or in a file where they are many.

At 9 B a layer's inputs of 8,192 tokens are 128 MiB, those of 40 layers 5 GiB.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from compress.checkpoint.disk import disk_errors
from compress.errors import MachineError
from compress.limits import TAPE_BYTES


class Tape:
    """Hidden states [layers, N, L, hidden] in float32, written layer by layer and read in batches of windows.

    Above TAPE_BYTES they lie in an unnamed file in `folder` (None: in memory in any case), which goes with the process:
    read and written by position, not mapped, because mapped pages would count as memory. Use as a context manager.
    Raises MachineError where the disk is full.
    """

    def __init__(self, layers: int, shape: torch.Size, folder: Path | None) -> None:
        self._shape = shape
        self._layer = 4 * prod(shape)  # bytes
        self._folder = folder if layers * self._layer > TAPE_BYTES else None
        self._memory: dict[int, torch.Tensor] = {}
        self._file = -1
        self._open = ExitStack()

    def __enter__(self) -> Tape:
        if self._folder is not None:
            with disk_errors(self._folder):
                self._file = self._open.enter_context(tempfile.TemporaryFile(dir=self._folder)).fileno()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.clear()
        self._open.close()

    def write(self, index: int, hidden: torch.Tensor) -> None:
        """Keep the inputs [N, L, hidden] of layer `index`."""
        if self._folder is None:
            self._memory[index] = hidden.clone()
            return
        content, done = _raw(hidden), 0
        with disk_errors(self._folder):
            while done < self._layer:
                done += os.pwrite(self._file, content[done:], index * self._layer + done)

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Windows [start, stop) of the inputs of layer `index`."""
        if self._folder is None:
            return self._memory[index][start:stop]
        part = torch.empty(stop - start, *self._shape[1:])
        content, done = _raw(part), 0
        window = self._layer // self._shape[0]
        while done < len(content):
            try:
                count = os.preadv(self._file, [content[done:]], index * self._layer + start * window + done)
            except OSError as error:
                raise MachineError(f"{self._folder}: reading failed ({error.strerror})") from None
            if not count:
                raise AssertionError(f"the inputs of layer {index} were not written")
            done += count
        return part

    def forget(self, index: int) -> None:
        """The inputs of layer `index` are not needed any more."""
        self._memory.pop(index, None)


def _raw(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in the machine's own memory."""
    return memoryview(value.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]  # numpy's stubs lack Buffer
