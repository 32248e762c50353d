"""Writing to a disk that may be full: what errors become, what has reached it, where a path will lie. Torch-free."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType

from compress.errors import MachineError

TORCH_SAVE = "inline_container"  # what torch.save's own errors name; it tells of no errno


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


class disk_errors:
    """Turns an OSError while writing into one line with exit code 4; and what libraries that write make of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else (error.strerror or str(error))
            raise MachineError(f"{self.path}: writing failed: {what}") from None
        if error is None:
            return
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and TORCH_SAVE in str(error)):
            full = "os error 28" in str(error) or shutil.disk_usage(existing(self.path)).free < 2**20
            what = "the disk is full" if full else str(error).splitlines()[0]
            raise MachineError(f"{self.path}: writing failed: {what}") from None
