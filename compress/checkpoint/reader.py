"""Read tensors of a checkpoint folder one at a time, or as rows, into memory of their own.

Plain positioned reads, not a memory map: mapped pages would count as memory of the process and grow with the
model. Every float that is read is checked: NaN or infinity ends the run with the tensor's name. Whole tensors and rows
come onto `device`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from compress.checkpoint.headers import DTYPE_BYTES, Header, TensorSpec, read_header
from compress.errors import MachineError, UserError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
AHEAD = 16 * 2**20  # bytes the kernel is asked for at once: an end waits for one such piece
CHUNK = 2**20  # small enough that what is read is still in a core's cache when it is checked and written


class Reader:
    """Tensors of `folder` by name. Use as a context manager; files are opened when first needed."""

    def __init__(self, folder: Path, header: Header | None = None, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        self.header = header or read_header(folder)
        self._files: dict[Path, int] = {}
        self._ahead: ThreadPoolExecutor | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.header.tensors

    def spec(self, name: str) -> TensorSpec:
        spec = self.header.tensors.get(name)
        if spec is None:
            raise UserError(f"{self.folder}: tensor '{name}' is missing")
        return spec

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor, converted to `dtype` when given."""
        spec = self.spec(name)
        return self._placed(self._read(spec, 0, spec.nbytes).reshape(spec.shape), dtype)

    def rows(self, name: str, index: Sequence[int] | slice, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of a matrix, [len(index), columns]; runs of neighbouring rows are one read each."""
        spec = self.spec(name)
        width = spec.nbytes // spec.shape[0]
        wanted = range(*index.indices(spec.shape[0])) if isinstance(index, slice) else index
        parts = []
        for start, stop in _runs(wanted):
            parts.append(self._read(spec, start * width, (stop - start) * width))
        value = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(len(wanted), *spec.shape[1:])
        return self._placed(value, dtype)

    def _placed(self, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        value = value.to(self.device)  # first: the conversion is faster there, and what is moved smaller
        return value if dtype is None else value.to(dtype)

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the kernel read these tensors into its cache, in a thread: what it allocates, it does for its caller."""
        if not hasattr(os, "posix_fadvise"):
            return
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(1, "prefetch")
        for name in names:
            spec, where = self.spec(name), self.header.locations[name]
            for start in range(0, spec.nbytes, AHEAD):
                piece = where.offset + start, min(AHEAD, spec.nbytes - start)
                self._ahead.submit(os.posix_fadvise, self._file(where.file), *piece, os.POSIX_FADV_WILLNEED)

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's bytes in order, as flat tensors of its own dtype of at most CHUNK bytes, in the machine's own
        memory: for plain copies."""
        spec = self.spec(name)
        for start in range(0, spec.nbytes, CHUNK):
            yield self._read(spec, start, min(CHUNK, spec.nbytes - start))

    def _read(self, spec: TensorSpec, start: int, nbytes: int) -> torch.Tensor:
        where = self.header.locations[spec.name]
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's stubs for 3.11 lack Buffer
        try:
            descriptor = self._file(where.file)
            done = 0
            while done < nbytes:
                count = os.preadv(descriptor, [view[done:]], where.offset + start + done)
                if count == 0:
                    raise UserError(f"{where.file}: truncated while reading '{spec.name}'")
                done += count
        except OSError as error:
            raise MachineError(f"{where.file}: reading '{spec.name}' failed ({error.strerror})") from None
        value = buffer.view(TORCH_DTYPES[spec.dtype])
        if value.is_floating_point() and value.element_size() > 1 and not finite(value):
            raise UserError(f"{where.file}: tensor '{spec.name}' holds NaN or infinite values")
        return value


def finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; much faster than `isfinite`, and without a copy as large as `value`."""
    # what is not finite stays so in a sum, the fastest pass there is; a sum may overflow by itself, then bounds tell
    if not value.numel() or bool(torch.isfinite(value.sum())):
        return True
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _runs(index: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = previous = None
    for row in index:
        if previous is not None and start is not None and row != previous + 1:
            yield start, previous + 1
            start = row
        elif start is None:
            start = row
        previous = row
    if start is not None and previous is not None:
        yield start, previous + 1


def spec_of(name: str, value: torch.Tensor) -> TensorSpec:
    """The TensorSpec that `value` would have on disk."""
    return TensorSpec(name, DTYPE_NAMES[value.dtype], tuple(value.shape))


assert set(TORCH_DTYPES) == set(DTYPE_BYTES)  # what a header may hold can be read
