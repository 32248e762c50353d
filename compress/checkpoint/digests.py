"""sha256 of files, remembered by path, size, time of change and inode, so that 20 GB are hashed once. Torch-free.

Each digest is a small file in the cache folder. It saves time and nothing else: without it a file is hashed anew.
`ahead` hashes in the background what will be asked for, beside work that waits for the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

from compress.checkpoint.demo import cache_folder
from compress.checkpoint.headers import read_header
from compress.errors import MachineError

WORTH_REMEMBERING = 2**20  # bytes
RECENT = 2 * 10**9  # nanoseconds: a file changed so lately may change again within one tick of its clock

_begun: dict[str, Future[str]] = {}  # by `_identity`: what a background thread hashes, or will


def digest(path: Path) -> str:
    """Hex sha256 of a file, from memory if it has not changed since it was hashed; MachineError if unreadable."""
    try:
        state = path.stat()
        if state.st_size < WORTH_REMEMBERING:
            return _sha256(path)
        said = _identity(path, state)
        memo = _memo(said)
        if memo.is_file():
            return memo.read_text()
        begun = _begun.pop(said, None)
        found = _sha256(path) if begun is None else begun.result()
        if begun is not None and _identity(path, path.stat()) != said:  # changed since it was begun
            return digest(path)
    except OSError as error:
        raise MachineError(f"{error.filename or path}: {error.strerror or error}") from None
    if time.time_ns() - state.st_mtime_ns > RECENT:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            _remember(memo, found)
    return found


def model_files(folder: Path) -> list[Path]:
    """What a checkpoint computes with: config.json and its weights. Raises UserError where they cannot be read."""
    return sorted({folder / "config.json", *(place.file for place in read_header(folder).locations.values())})


def model_digest(folder: Path) -> str:
    """Hex sha256 of what a checkpoint computes: config.json and its weights, by name and content."""
    return digest_of({file.name: digest(file) for file in model_files(folder)})


def digest_of(files: Mapping[str, str]) -> str:
    """The same of files whose digests are known, as a receipt names them: name -> hex sha256."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def ahead(paths: Iterable[Path]) -> None:
    """Begin to hash these files, one after another, in a thread of their own; `digest` waits for what is begun.

    A file that cannot be read, is small or remembered is left to `digest`. The thread ends with the process.
    """
    work: list[tuple[Path, Future[str]]] = []
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            said = _identity(path, state)
            if state.st_size >= WORTH_REMEMBERING and said not in _begun and not _memo(said).is_file():
                _begun[said] = Future()
                work.append((path, _begun[said]))
    if work:
        threading.Thread(target=_hash, args=(work,), name="digests", daemon=True).start()


def _hash(work: list[tuple[Path, Future[str]]]) -> None:
    for path, future in work:
        try:
            future.set_result(_sha256(path))
        except BaseException as error:
            future.set_exception(error)  # raised where the digest is asked for


def _identity(path: Path, state: os.stat_result) -> str:
    return f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ino}"


def _memo(said: str) -> Path:
    return cache_folder() / "digests" / hashlib.sha256(said.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _remember(memo: Path, found: str) -> None:
    memo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as partial:
        partial.write(found)
    os.replace(partial.name, memo)
