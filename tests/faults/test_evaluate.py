"""`evaluate` on bad input: what headers and folders can show is refused before any work, in one line.

And what measuring itself must not do: keep files open, lose numbers, or fail on a model that is merely very bad.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.cli import main
from compress.data import DataSpec
from compress.errors import MachineError, UserError
from compress.machine import Machine
from compress.steps.evaluate.run import Evaluator, evaluate
from compress.stream.forward import Stream
from tests import tiny

FEW = ["--samples", "2", "--length", "32", "--threads", "1"]
DATA = DataSpec(source="builtin", samples=2, length=32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "model")


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts a forward pass fails the test."""

    def started(*arguments: object, **keywords: object) -> None:
        pytest.fail("a forward pass was started")

    monkeypatch.setattr(Stream, "hidden", started)


def change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace or add tensors; config.json stays as it is."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *says: str) -> None:
    capsys.readouterr()
    assert main(["evaluate", *arguments, *FEW, "-q"]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("hint: ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
    for word in says:
        assert word in lines[0]


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("which", ["model", "reference"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lm_head.weight", (tiny.VOCAB, 48)),
        ("model.embed_tokens.weight", (tiny.VOCAB, 48)),
        ("model.layers.1.mlp.stray.weight", (4, 4)),
    ],
)
def test_tensors_that_config_json_does_not_imply(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], which: str, name: str, shape: tuple[int, int]
) -> None:
    good = tiny.llama(tmp_path / "good")
    change(model, {name: torch.zeros(shape)})
    arguments = [str(model)] if which == "model" else [str(good), "--reference", str(model)]
    refused(capsys, arguments, 2, f"{model}: ", name)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("which", ["model", "reference"])
@pytest.mark.parametrize(
    ("shape", "says"),
    [((5, 5), "mismatched_keys"), (None, "missing_keys")],
)
def test_a_broken_vision_tower(
    shape: tuple[int, ...] | None, says: str, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No logit of a text shows it, and yet the numbers would be those of a model that nobody can load."""
    model, broken = tiny.glm4v(tmp_path / "model"), tiny.glm4v(tmp_path / "broken")
    name = "model.visual.merger.proj.weight"
    tensors = load_file(broken / "model.safetensors")
    del tensors[name]
    if shape:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    pair = (broken, model) if which == "model" else (model, broken)
    refused(capsys, [str(pair[0]), "--reference", str(pair[1])], 2, "broken", says, name)


@pytest.mark.usefixtures("no_forward")
def test_a_reference_with_another_vocabulary(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.llama(tmp_path / "other", vocab_size=400)
    refused(capsys, [str(model), "--reference", str(other)], 2, "400", "384", "vocabulary")
    with Evaluator(model, DATA, reference=model) as evaluator, pytest.raises(UserError, match="vocabulary"):
        evaluator.measure(other, "other")


@pytest.mark.usefixtures("no_forward")
def test_too_little_memory(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [str(model), "--memory", "1MiB"], 4, "memory", "1.0 MiB")


def test_memory_counts_hidden_states_and_logits(tmp_path: Path, model: Path) -> None:
    """One byte less than the sum is refused, the sum is not."""
    logits, hidden = 2 * 512 * tiny.VOCAB * 4, 2 * 32 * 64 * 4
    other = tiny.llama(tmp_path / "other", seed=1)
    for reference, needed in ((None, logits + hidden), (model, logits + hidden), (other, logits + 2 * hidden)):
        evaluate(model, DATA, Machine(1, needed), reference=reference)
        with pytest.raises(MachineError, match="memory"):
            evaluate(model, DATA, Machine(1, needed - 1), reference=reference)


def open_files(folder: Path) -> list[str]:
    """Files below `folder` that this process holds open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue  # the descriptor of the listing
        if target.startswith(str(folder)):
            found.append(target)
    return found


def test_files_are_closed_so_that_a_deleted_folder_frees_its_disk(tmp_path: Path, model: Path) -> None:
    other = tiny.llama(tmp_path / "other", seed=1)
    with Evaluator(model, DATA, reference=model) as evaluator:
        first = evaluator.measure(model, "dense")
        found = evaluator.measure(other, "other")
        assert open_files(other) == []
        assert evaluator.measure(other, "again") == found
        assert open_files(model) != []  # its output matrix is read for every comparison
    assert open_files(tmp_path) == []
    assert first["kl"] == 0 and first["top1_agreement"] == 1 and found["kl"] > 0
    assert evaluate(other, DATA, Machine(1), reference=model) == found
    assert open_files(tmp_path) == []


def test_files_are_closed_when_measuring_fails(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "norm", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, DATA, Machine(1), reference=tiny.llama(tmp_path / "other"))
    with pytest.raises(ZeroDivisionError):
        evaluate(model, DATA, Machine(1))
    assert open_files(tmp_path) == []


def test_a_perplexity_above_all_floats_is_infinite(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, file = tiny.llama(tmp_path / "bad"), tmp_path / "bad.json"
    change(bad, {"lm_head.weight": load_file(bad / "model.safetensors")["lm_head.weight"] * 1e4})
    found = evaluate(bad, DATA, Machine(1), reference=model)
    assert found["perplexity"] == found["perplexity_ratio"] == math.inf
    assert math.isfinite(found["reference_perplexity"]) and math.isfinite(found["kl"])
    assert evaluate(model, DATA, Machine(1), reference=bad)["perplexity_ratio"] == 0
    assert main(["evaluate", str(bad), *FEW, "-q", "--json", "-o", str(file)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == shown  # both strict JSON, which has no infinity
    assert shown["perplexity"] is None and shown["tokens"] == 62


@pytest.mark.usefixtures("no_forward")
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("mine")
    before = sorted(tmp_path.iterdir())
    for file in (
        tmp_path / "text" / "numbers.json",
        tmp_path / "text" / "deep" / "numbers.json",
        tmp_path / ("n" * 300),
    ):
        refused(capsys, [str(model), "-o", str(file)], 2, f"{file}: cannot be written")
    refused(capsys, ["nowhere", "-o", str(tmp_path / "new" / "numbers.json")], 2, "nowhere")
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_are_shown_even_if_the_file_fails_after_all(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "numbers.json"

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.commands.evaluate.os.replace", full)
    before = sorted(tmp_path.iterdir())
    assert main(["evaluate", str(model), *FEW, "-q", "-o", str(file)]) == 4
    out, err = capsys.readouterr()
    assert "perplexity" in out
    assert err == f"error: {file}: cannot be written (No space left on device)\n"
    assert sorted(tmp_path.iterdir()) == before
    assert main(["evaluate", str(model), *FEW, "-q", "-o", str(file), "--json"]) == 4
    said = json.loads(capsys.readouterr().out)  # one document
    assert said["error"]["exit_code"] == 4 and said["tokens"] == 62


def test_the_seed_is_taken_and_changes_nothing_because_nothing_is_drawn(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for seed in ("0", "1"):
        assert main(["evaluate", str(model), *FEW, "-q", "--json", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_file_named_partial_is_left_alone(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "b"
    assert main(["evaluate", str(model), *FEW, "-q", "-o", str(folder / "n.json")]) == 0
    (folder / "n.json.partial").write_text("mine")
    assert main(["evaluate", str(model), *FEW, "-q", "-o", str(folder / "n.json"), "--overwrite"]) == 0
    assert (folder / "n.json.partial").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["n.json", "n.json.partial"]
    assert json.loads((folder / "n.json").read_text())["tokens"] == 62
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "n.json").stat().st_mode & 0o777 == 0o666 & ~mask
