"""A run that ended early is taken up where it stood, and ends with the bytes of one that did not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress import output, resume
from compress.checkpoint import writer
from compress.checkpoint.ledger import Ledger
from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.cli import main
from compress.data import DataSpec
from compress.steps import STEPS
from tests import tiny
from tests.invariants.test_run import MOMENT, contents

RECIPE = """
model: {model}
data:
  calibration: {{samples: 4, length: 64}}
  training: {{samples: 8, length: 64}}
  evaluation: {{samples: 2, length: 64}}
steps:
  - prune: {{ffn: 0.25}}
  - distill: {{max_steps: 3, batch: 2}}
  - quantize: {{format: int8}}
evaluate: each
"""
LINES = ["--threads", "1", "--checkpoint-every", "0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny.llama(folder / "model")))
    return file


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run leaves."""
    return finish(recipe, tmp_path_factory.mktemp("whole") / "out")


def finish(recipe: Path, out: Path, *more: str) -> dict[str, bytes]:
    assert main(["run", str(recipe), "-o", str(out), *LINES, "-q", *more]) == 0
    assert not output.work_of(out).exists()
    return {name: content for name, content in contents(out).items() if name not in MOMENT}


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> Callable[[], int]:
    """The `at`-th call of owner.name raises KeyboardInterrupt when it has done its work."""
    real, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        done = real(*arguments, **keywords)
        if calls == at:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(owner, name, counted)
    return lambda: calls


def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps whose work is done from now on."""
    names: list[str] = []
    for kind, step in STEPS.items():
        real = step.load()

        def work(job: Any, kind: str = kind, real: Any = real) -> Any:
            names.append(kind)
            return real(job)

        monkeypatch.setattr(f"compress.steps.{kind}.run.run", work)
    return names


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        *((Ledger, "save", at) for at in (1, 2, 3, 4, 5, 6)),  # states of prune and quantize, and outcomes
        (Ledger, "saved", 3),  # a training checkpoint, sealed
        (Writer, "put", 7),
        (resume.Work, "finished", 1),
        (resume.Work, "finished", 3),
        (resume.Work, "evaluated", 2),
    ],
)
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    owner: Any,
    name: str,
    at: int,
    recipe: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        calls = interrupt(patched, owner, name, at)
        assert main(["run", str(recipe), "-o", str(out), *LINES, "-q"]) == 130
        assert calls() == at
    error = capsys.readouterr().err
    assert error.startswith("error: interrupted\nhint: finished work is kept in") and error.count("\n") == 2
    assert f"to go on: autoglm-compress run {recipe} -o {out}" in error
    assert not out.exists()
    assert finish(recipe, out) == whole


def test_finished_steps_and_measurements_are_not_repeated(
    recipe: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line = ["run", str(recipe), "-o", str(out), *LINES, "-q"]
    assert main([*line, "--stop-after", "2"]) == 0 and not out.exists()
    names = ran(monkeypatch)
    measured: list[str] = []
    from compress.steps.evaluate.run import Evaluator

    real = Evaluator.measure
    monkeypatch.setattr(Evaluator, "measure", lambda self, f, label: measured.append(label) or real(self, f, label))  # type: ignore[func-returns-value]
    assert main(line) == 0
    assert (names, measured) == (["quantize"], ["3-quantize"])
    assert {k: v for k, v in contents(out).items() if k not in MOMENT} == whole
    taken = [step.get("taken_over", False) for step in json.loads((out / "measured.json").read_text())["steps"]]
    assert taken == [True, True, False]


@pytest.fixture(scope="module")
def unpublished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run leaves that ended just before its result was in place: `out.work`, with every step."""
    folder = tmp_path_factory.mktemp("unpublished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(import_module("compress.run"), "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["run", str(recipe), "-o", str(folder / "out"), *LINES, "-q", "--keep-work"]) == 130
    return folder


@pytest.mark.parametrize(
    ("change", "repeated"),
    [
        (["--set", "steps.2.format=w8a16"], ["quantize"]),
        (["--set", "steps.1.learning_rate=0.001"], ["distill", "quantize"]),
        (["--set", "steps.0.ffn=0.5"], ["prune", "distill", "quantize"]),
        (["--shard-size", "50KB"], ["prune", "distill", "quantize"]),
        (["--set", "data.evaluation.samples=3"], []),
        (["--set", "gates.max_kl=9"], []),
        (["--fresh"], ["prune", "distill", "quantize"]),
    ],
)
def test_a_changed_option_repeats_only_what_depends_on_it(
    change: list[str],
    repeated: list[str],
    recipe: Path,
    unpublished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = shutil.copytree(unpublished, tmp_path / "here") / "out"
    line = ["run", str(recipe), "-o", str(out), *LINES, "-q", "--keep-work"]
    names = ran(monkeypatch)
    assert main([*line, *change]) == 0
    assert names == repeated
    if change[-1] in ("steps.2.format=w8a16", "data.evaluation.samples=3"):  # for the others it would be the same work
        again = finish(recipe, tmp_path / "again", *change)
        assert again == {name: content for name, content in contents(out).items() if name not in MOMENT}


@pytest.fixture(scope="module")
def refused(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run leaves whose gate failed: `out.rejected` and `out.work`."""
    folder = tmp_path_factory.mktemp("refused")
    line = ["run", str(recipe), "-o", str(folder / "out"), *LINES, "-q", "--set", "gates.max_kl=1e-9"]
    assert main(line) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["out.rejected", "out.work"]
    return folder


def test_what_a_gate_rejected_is_taken_where_gates_alone_are_changed(
    recipe: Path, refused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.copytree(refused, tmp_path / "here")
    line = ["run", str(recipe), "-o", str(here / "out"), *LINES, "-q", "--set"]
    names = ran(monkeypatch)
    assert main([*line, "gates.max_kl=1e-9"]) == 3 and names == []  # as before: nothing is done twice
    assert contents(here / "out.rejected").keys() == contents(refused / "out.rejected").keys()
    found = finish(recipe, here / "out", "--set", "gates.max_kl=9")
    assert names == [] and not (here / "out.rejected").exists()
    assert found == finish(recipe, tmp_path / "again", "--set", "gates.max_kl=9")


@pytest.mark.parametrize(
    ("spoil", "change"),
    [
        (lambda rejected: None, ["--set", "steps.2.format=w8a16"]),
        (lambda rejected: None, ["--fresh"]),
        (lambda rejected: None, ["--set", "data.evaluation.samples=3"]),  # earlier stages were not measured so
        (lambda rejected: (rejected / "extra").touch(), []),
        (lambda rejected: (rejected / "config.json").write_text("{}"), []),
        (lambda rejected: (rejected / "receipt.json").open("a").write(" "), []),
        (shutil.rmtree, []),
    ],
)
def test_what_a_gate_rejected_is_left_where_anything_else_has_changed(
    spoil: Callable[[Path], None],
    change: list[str],
    recipe: Path,
    refused: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = shutil.copytree(refused, tmp_path / "here")
    spoil(here / "out.rejected")
    before = contents(here / "out.rejected")
    names = ran(monkeypatch)
    assert main(["run", str(recipe), "-o", str(here / "out"), *LINES, "-q", "--stop-after", "1", *change]) == 0
    assert names == ["prune"]
    assert contents(here / "out.rejected") == before


def test_a_rejected_result_is_not_lost_where_the_run_that_takes_it_fails(
    recipe: Path, refused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.copytree(refused, tmp_path / "here")
    before = contents(here / "out.rejected")
    from compress.steps.evaluate.run import Evaluator

    real = Evaluator.measure

    def measure(self: Any, folder: Path, label: str) -> Any:
        if label != "dense":
            assert folder == here / "out.rejected"
            raise KeyboardInterrupt
        return real(self, folder, label)

    monkeypatch.setattr(Evaluator, "measure", measure)
    line = ["run", str(recipe), "-o", str(here / "out"), *LINES, "-q", "--set", "gates.max_kl=9", "--set"]
    assert main([*line, "evaluate=last", "--set", "data.evaluation.samples=3", "--discard"]) == 130
    assert contents(here / "out.rejected") == before


def test_to_stop_at_a_step_that_is_over_is_refused(
    recipe: Path, refused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = shutil.copytree(refused, tmp_path / "here")
    before = {path: content for path, content in contents(here).items() if ".lock" not in path}
    line = ["run", str(recipe), "-o", str(here / "out"), *LINES, "-q", "--set", "gates.max_kl=9"]
    assert main([*line, "--stop-after", "1"]) == 2
    assert "--stop-after: 1-prune is over and its folder gone; an earlier run went on to 3-quantize" in (
        capsys.readouterr().err
    )
    assert contents(here) == before


ONE = "model: {model}\nsteps:\n  - {step}\nevaluate: never\ndata: {{calibration: {{samples: 4, length: 64}}}}\n"


@pytest.mark.parametrize("step", ["prune: {ffn: 0.25}", "quantize: {format: w8a16}"])
@pytest.mark.parametrize("other", ["seed=1", "steps.0={prune: {ffn: 0.25, damping: 0.02}}"])
def test_what_another_recipe_left_in_its_place_is_never_taken_for_its_own(
    step: str, other: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leaves a state, or its whole folder; B writes over it and ends early; A goes on."""
    file, out = tmp_path / "one.yaml", tmp_path / "out"
    file.write_text(ONE.format(model=recipe.parent / "model", step=step))
    line = ["run", str(file), "-o", str(out), "--threads", "1", "-q"]
    whole = finish(file, tmp_path / "whole")
    for owner, name, at in ((Ledger, "save", 2), (resume.Work, "finished", 1)):
        with monkeypatch.context() as patched:
            interrupt(patched, owner, name, at)
            assert main([*line, "--checkpoint-every", "0"]) == 130
        for there, method in ((Writer, "put"), (resume, "save_outcome")):
            with monkeypatch.context() as patched:
                interrupt(patched, there, method, 7 if method == "put" else 1)
                code = main([*line, "--set", other])
            assert code == 130 or (step.startswith("quantize") and method == "put")
            shutil.rmtree(out, ignore_errors=True)
        assert finish(file, out) == whole
        shutil.rmtree(out)


def test_a_changed_source_is_another_input(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    changed = tmp_path / "model"
    shutil.copytree(recipe.parent / "model", changed)
    line = ["run", str(recipe), "-o", str(out), *LINES, "-q", "--set", f"model={changed}"]
    weights = changed / "model.safetensors"
    assert main([*line, "--stop-after", "1"]) == 0
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    names = ran(monkeypatch)
    assert main(line) == 0
    assert names == ["prune", "distill", "quantize"]


def test_another_builtin_text_is_another_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every version of Python words it in its own way; a mix that does not hold it does not ask."""
    alone, mixed = DataSpec(source="builtin", samples=2), DataSpec(source={"builtin": 1, "self": 1}, samples=2)
    before = [resume.data_key(spec) for spec in (alone, mixed, DataSpec(source="self", samples=2))]
    monkeypatch.setattr(resume, "builtin_parts", lambda: {"calibration": ("other words",)})
    after = [resume.data_key(spec) for spec in (alone, mixed, DataSpec(source="self", samples=2))]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_a_torn_or_foreign_state_starts_the_step_over(
    recipe: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (at, spoil) in enumerate(((2, b"\0" * 100), (8, b"{}"))):
        out = tmp_path / f"out-{number}"
        with monkeypatch.context() as patched:
            interrupt(patched, Ledger, "saved", at)
            assert main(["run", str(recipe), "-o", str(out), *LINES, "-q"]) == 130
        states = [*output.work_of(out).glob("*.state"), *output.work_of(out).glob("*.training/*/optimizer.pt")]
        assert len(states) == 1
        states[0].write_bytes(spoil)
        assert finish(recipe, out) == whole


def test_a_state_whose_layers_were_taken_away_is_never_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the next run nor, when that has laid out its files and was interrupted as well, by the one after."""
    line = ["prune", str(tiny.llama(tmp_path / "source")), "--keep-ffn", "40", "--samples", "6", "--length", "64"]
    line += ["--threads", "1", "--checkpoint-every", "0", "-q", "-o"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert main([*line, str(whole)]) == 0
    with monkeypatch.context() as patched:
        interrupt(patched, Ledger, "save", 2)
        assert main([*line, str(out)]) == 130
    shutil.rmtree(output.work_of(out) / "1-prune.partial")
    with monkeypatch.context() as patched:
        interrupt(patched, Writer, "put", 1)
        assert main([*line, str(out)]) == 130
    assert main([*line, str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_full_disk_keeps_finished_layers_unless_told_otherwise(
    recipe: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    source = contents(recipe.parent / "model")
    line = ["run", str(recipe), "-o", str(out), *LINES, "-q"]
    real = writer._pwrite

    def full(descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if offset > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, data, offset)

    for more, kept in (([], True), (["--discard"], False)):
        with monkeypatch.context() as patched:
            patched.setattr(writer, "_pwrite", full)
            assert main([*line, *more]) == 4
        error = capsys.readouterr().err
        assert "the disk is full" in error and ("finished work is kept in" in error) is kept
        assert not out.exists() and contents(recipe.parent / "model") == source
        assert output.work_of(out).exists() is kept
    assert finish(recipe, out) == whole


@pytest.mark.parametrize("value", ["0", "3", "x"])
def test_stop_after_names_a_step_before_the_last(
    value: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe), "-o", str(tmp_path / "out"), "-q", "--stop-after", value]) == 2
    assert f"--stop-after: found {value}".replace("found x", "found 'x'") in capsys.readouterr().err.replace("'0'", "0")
    assert not list(tmp_path.iterdir())


def test_a_second_run_refuses_or_waits(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    line = ["quantize", str(recipe.parent / "model"), "-o", str(out), "--format", "bf16", "--threads", "1"]
    released = threading.Event()

    def hold() -> None:
        with output.locked(out):
            held.set()
            time.sleep(1)
            released.set()

    held = threading.Event()
    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    assert main([*line, "-q"]) == 2 and "another run is writing it" in capsys.readouterr().err
    assert main([*line, "--wait"]) == 0 and released.is_set()
    assert "waiting" in capsys.readouterr().err
    other.join()
    assert main([*line, "--wait", "-q"]) == 2  # the other run made it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_of_many_waiters_one_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def one() -> None:
        nonlocal inside, most
        with output.locked(tmp_path / "out", lambda: None):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list(tmp_path.iterdir())


def test_a_result_half_replaced_by_a_killed_run_is_cleared_up(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = tmp_path / ".out.old-abc" / "out"
    left.mkdir(parents=True)
    finish(recipe, out)
    assert not left.parent.exists()


def test_a_state_is_read_back_exactly(tmp_path: Path) -> None:
    import torch

    tensors = {"a": torch.tensor([1e-40, float("inf"), -0.0]), "b": torch.ones(2, 3, dtype=torch.bfloat16).T}
    one = Ledger(tmp_path / "x.state", lambda: "key", every=0)
    assert one.load() is None and one.due()
    one.save({"n": 0.1, "nested": {"x": [1, None]}}, tensors)
    found = Ledger(tmp_path / "x.state", lambda: "key").load()
    assert found is not None and found.facts == {"n": 0.1, "nested": {"x": [1, None]}}
    assert all(
        torch.equal(found.tensors[name].view(torch.uint8), tensors[name].contiguous().view(torch.uint8))
        for name in tensors
    )
    assert all(value.data_ptr() % 64 == 0 for value in found.tensors.values())  # as torch aligns what it makes
    assert Ledger(tmp_path / "x.state", lambda: "other").load() is None
    one.forget()
    assert not list(tmp_path.iterdir())


def test_only_a_partial_folder_of_the_same_layout_is_taken_up(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model")
    with Reader(model) as reader:
        specs = list(reader.header.tensors.values())
        names = [spec.name for spec in specs]

        def begin(layout: list[Any]) -> None:
            with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", layout, keep=True) as half:
                half.copy(reader, names[0])
                half.sync()
                raise KeyboardInterrupt

        begin(specs)
        with Writer(tmp_path / "out", specs, keep=True) as second:
            second.resume(names[:1])
            assert second.written == {names[0]}
            for name in names[1:]:
                second.copy(reader, name)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
        begin(specs[:-1])
        with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", specs, keep=True) as other:
            assert os.path.getsize(other.partial / "model.safetensors") < 10_000  # begun anew
            raise KeyboardInterrupt


def test_a_folder_for_training_in_which_nothing_was_saved_is_no_finished_work(tmp_path: Path) -> None:
    work: Any = SimpleNamespace(folder=tmp_path)
    saved = tmp_path / "1-distill.training"
    saved.mkdir()
    assert not resume.Work.holds_something(work)
    (saved / "checkpoint-10").mkdir()
    assert resume.Work.holds_something(work)
