"""Killed without warning at any moment, a run that is started again ends with the bytes of one that was not."""

from __future__ import annotations

from pathlib import Path

from tests.kills import trials


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    found = list(trials(tmp_path, 4, seed=1))
    assert [trial.wrong for trial in found] == [()] * 4
    assert any(trial.reused for trial in found), found
