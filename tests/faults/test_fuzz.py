"""50 of the damaged checkpoints and recipes of bench/fuzz.py: refused in one line, or done as stock transformers would.

The driver itself is tried on commands that end as they must not.
"""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any

import pytest

from tests import fuzz, mutations, tiny


@pytest.mark.parametrize("kind", [fuzz.checkpoints, fuzz.damaged_recipes], ids=["checkpoints", "recipes"])
def test_what_is_damaged_is_refused_or_done_right(kind: Any, tmp_path: Path) -> None:
    endings: collections.Counter[str] = collections.Counter()
    for outcome in kind(tmp_path, 25, seed=0):
        assert not outcome.wrong, f"{outcome.case}: {'; '.join(outcome.wrong)}\n{outcome.said}"
        endings[outcome.ending] += 1
    assert endings["refused"] > 5 and endings["done, as stock"] > 0, endings


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "", None),
        (2, "error: x\n", None),
        (2, "error: x\nhint: y\n", None),
        (2, "error: r.yaml: 2 problems\na\nb\n", None),
        (3, "error: 2 gates failed; the result lies in x\na\nb\n", None),
        (None, "", "it hung"),
        (1, "error: internal error\n", "exit code 1"),
        (-9, "", "exit code -9"),
        (2, "error: x\nTraceback (most recent call last):\n", "a traceback"),
        (2, "", "0 lines"),
        (2, "x\n", "1 lines"),
        (2, "error: x\ny\n", "2 lines"),
        (2, "error: 3 problems:\na\nb\n", "3 lines"),
    ],
)
def test_the_judge_of_endings(code: int | None, said: str, wrong: str | None, tmp_path: Path) -> None:
    found = list(fuzz.wrong_ending(code, said, tmp_path / "out"))
    assert found == [] if wrong is None else found[0].startswith(wrong)
    (tmp_path / "out").mkdir()
    assert ("OUT is there" in fuzz.wrong_ending(2, "error: x\n", tmp_path / "out")) is True


def test_the_judge_of_results(tmp_path: Path) -> None:
    """A source that stock transformers reads otherwise than we do, or not at all, is found out."""
    one, other = tiny.llama(tmp_path / "one"), tiny.llama(tmp_path / "other", rms_norm_eps=0.1)
    assert fuzz.unlike_stock(one, one) == []
    (wrong,) = fuzz.unlike_stock(one, other)
    assert wrong.startswith("config: rms_norm_eps")
    (one / "model.safetensors").write_bytes(b"")
    (wrong,) = fuzz.unlike_stock(one, one)
    assert wrong.startswith("stock transformers does not load the source")


def test_a_case_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, model = fuzz.start_server(), tiny.llama(tmp_path / "model")
    command = ["quantize", str(model), "-o", str(tmp_path / "out"), "--format", "w8a16", "--threads", "1", "-q"]
    assert fuzz.attempt(server, "x", command, tmp_path / "out", model).ending == "done, as stock"
    monkeypatch.setattr(fuzz, "PATIENCE", 0.01)
    outcome = fuzz.attempt(server, "x", [*command, "--overwrite"], tmp_path / "out", model)  # takes longer than that
    assert outcome.code is None and outcome.ending == "WRONG" and outcome.wrong[0].startswith("it hung")


def test_damage_is_the_same_for_the_same_dice(tmp_path: Path) -> None:
    recipe = {"model": "m", "data": {"evaluation": {"samples": 2}}, "steps": [{"prune": {"ratio": 0.2}}]}
    texts = [[mutations.mutated(recipe, random.Random(f"{run} {n}")) for n in range(50)] for run in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    file = tmp_path / "config.json"
    said = []
    for seed in (0, 0, 1):
        file.write_text('{"hidden_size": 64, "vocab_size": 384}')
        said.append((mutations.damaged(file, random.Random(seed)), file.read_bytes()))
    assert said[0] == said[1] != said[2]
