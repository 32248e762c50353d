"""sha256 of files, remembered by path, size, time of change and inode, so that 20 GB are hashed once. Torch-free.

Each digest is a small file in the cache folder. It saves time and nothing else: without it a file is hashed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from compress.checkpoint.demo import cache_folder
from compress.errors import MachineError

WORTH_REMEMBERING = 2**20  # bytes
RECENT = 2 * 10**9  # nanoseconds: a file changed so lately may change again within one tick of its clock


def digest(path: Path) -> str:
    """Hex sha256 of a file, from memory if it has not changed since it was hashed; MachineError if unreadable."""
    try:
        state = path.stat()
        if state.st_size < WORTH_REMEMBERING:
            return _sha256(path)
        said = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ino}"
        memo = cache_folder() / "digests" / hashlib.sha256(said.encode()).hexdigest()
        if memo.is_file():
            return memo.read_text()
        found = _sha256(path)
    except OSError as error:
        raise MachineError(f"{error.filename or path}: {error.strerror or error}") from None
    if time.time_ns() - state.st_mtime_ns > RECENT:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            _remember(memo, found)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _remember(memo: Path, found: str) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as partial:
        partial.write(found)
    os.replace(partial.name, memo)
