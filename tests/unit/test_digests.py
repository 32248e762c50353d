"""Digests of files: remembered while the file stays what it was, and only then."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from compress.checkpoint import digests
from compress.errors import MachineError

LONG_AGO = (1_600_000_000_000_000_000, 1_600_000_000_000_000_000)


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read, in order."""
    monkeypatch.setattr(digests, "_begun", {})  # what other tests of this process began and nobody asked for
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "WORTH_REMEMBERING", 4)
    read: list[Path] = []
    real = digests._sha256

    def counting(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(digests, "_sha256", counting)
    return read


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    os.utime(file, ns=LONG_AGO)
    expected = hashlib.sha256(b"first").hexdigest()
    assert [digests.digest(file), digests.digest(file)] == [expected, expected] and hashed == [file]
    file.write_bytes(b"other")  # as long as before
    assert digests.digest(file) == hashlib.sha256(b"other").hexdigest() and len(hashed) == 2


def test_small_and_fresh_files_are_hashed_every_time(tmp_path: Path, hashed: list[Path]) -> None:
    small, fresh = tmp_path / "small", tmp_path / "fresh"
    small.write_bytes(b"abc")
    os.utime(small, ns=LONG_AGO)
    fresh.write_bytes(b"could change within this tick")
    for file in (small, small, fresh, fresh):
        digests.digest(file)
    assert len(hashed) == 4


def test_without_a_cache_it_only_takes_longer(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    os.utime(tmp_path / "file", ns=LONG_AGO)
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(tmp_path / "file" / "no-folder"))
    assert digests.digest(tmp_path / "file") == digests.digest(tmp_path / "file")
    assert len(hashed) == 2
    with pytest.raises(MachineError, match="No such file"):
        digests.digest(tmp_path / "missing")


def test_what_was_begun_is_hashed_once(tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    digests.ahead([file, tmp_path / "not there"])
    assert digests.digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert hashed == [file]
    assert digests._begun == {}


def test_a_file_that_changes_while_it_is_hashed_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the moment it was asked for and the end of the hash: the digest is of what it holds then."""
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "large"
    file.write_bytes(bytes(digests.WORTH_REMEMBERING))
    asked = threading.Event()
    real = digests._sha256

    def late(path: Path) -> str:
        if threading.current_thread().name != "digests":
            return real(path)
        found = real(path)
        asked.wait(10)
        file.write_bytes(bytes(digests.WORTH_REMEMBERING + 1))
        return found

    monkeypatch.setattr(digests, "_sha256", late)
    digests.ahead([file])
    memo = digests._memo
    monkeypatch.setattr(digests, "_memo", lambda said: asked.set() or memo(said))  # `digest` has looked at the file
    assert digests.digest(file) == hashlib.sha256(bytes(digests.WORTH_REMEMBERING + 1)).hexdigest()
