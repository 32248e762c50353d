"""What the machine brings: threads as given, as OMP_NUM_THREADS says, or all cores."""

from __future__ import annotations

import os

import pytest

from compress.machine import Machine


@pytest.mark.parametrize(
    ("said", "given", "threads"),
    [("3", None, 3), ("3", 2, 2), ("4,2", None, 4), ("", None, 7), ("0", None, 7), ("many", None, 7)],
)
def test_threads(said: str, given: int | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    assert Machine.detect(given).threads == threads
