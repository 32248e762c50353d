"""What people see: sizes, plain logs, tables that fit, one JSON document, no markup from model names."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from compress.errors import size
from compress.progress import EVERY, BarProgress, LogProgress, duration
from compress.report import Screen


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (269_030_016, "256.6 MiB"),
        (20_585_554_944, "19.2 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def log(verbose: bool = False) -> tuple[LogProgress, io.StringIO, Clock]:
    text, clock = io.StringIO(), Clock()
    return LogProgress(Console(file=text, width=20), verbose, clock), text, clock


def test_a_log_gets_a_line_every_few_seconds_with_the_time_that_is_left() -> None:
    progress, text, clock = log()
    with progress.task("pruning layers", 100) as task:
        for _ in range(100):
            clock.now += 0.2
            task.advance()
    lines = text.getvalue().splitlines()
    assert lines[0] == "pruning layers: 25/100, 5.0 s, about 15 s left"
    assert lines[-1] == "pruning layers: done, 20 s"
    assert len(lines) == 20 / EVERY  # the last of the periodic ones is the line of the end


def test_what_an_earlier_run_did_says_nothing_about_the_pace() -> None:
    progress, text, clock = log()
    with progress.task("distilling", 160) as task:
        task.advance(79, earlier=True)
        for _ in range(7):
            clock.now += 1
            task.advance()
    assert text.getvalue().splitlines()[0] == "distilling: 84/160, 5.0 s, about 1 min 16 s left"


def test_a_bar_counts_what_an_earlier_run_did_but_not_its_pace() -> None:
    progress = BarProgress(Console(file=io.StringIO(), force_terminal=True, width=100))
    with progress.task("distilling", 160) as task:
        task.advance(79, earlier=True)
        (bar,) = progress._bars.tasks
        assert bar.completed == 79 and bar.speed is None
        task.advance()
        task.advance()
        assert bar.completed == 81 and bar.speed is not None


def test_a_short_task_leaves_no_line_unless_asked() -> None:
    for verbose, expected in ((False, ""), (True, "reading: done, 0.5 s\n")):
        progress, text, clock = log(verbose)
        with progress.task("reading", 1) as task:
            clock.now += 0.5
            task.advance()
        assert text.getvalue() == expected


def test_a_failed_task_is_not_called_done() -> None:
    progress, text, clock = log()
    with pytest.raises(RuntimeError), progress.task("reading", 1):
        clock.now += 60
        raise RuntimeError
    assert text.getvalue() == ""


def test_bars_nest_and_come_down() -> None:
    text = io.StringIO()
    progress = BarProgress(Console(file=text, force_terminal=True, width=100), verbose=True)
    with progress.task("outer", 2) as outer:
        outer.advance()
        with progress.task("inner [bold]", 3) as inner:
            inner.advance(3)
            progress.note("a note [red]as it is[/red]")
    said = text.getvalue()
    assert "a note [red]as it is[/red]" in said and "inner [bold]" in said
    assert said.index("inner [bold]: ") < said.index("outer: ")
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h")  # the cursor is shown again as often as hidden


ROWS: tuple[dict[str, Any], ...] = (
    {"stage": "dense", "perplexity": 25.0, "perplexity_ratio": 1.0, "parameters": 134515008, "bytes": 269030016},
    {"stage": "1-prune", "perplexity": 30.0, "perplexity_ratio": 1.2, "parameters": 113364288, "bytes": 226728576}
    | {"kl": 0.25, "top1_agreement": 0.801, "seconds": 75.0},
)


class FakeResult:
    """The fields of a run's Result."""

    def __init__(self, out: Any) -> None:
        self.out, self.stages = out, ROWS


def test_a_result_is_a_row_a_stage(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # test processes side by side have one, of 80
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm4v", "vision_config": {}}))
    Screen().result(FakeResult(tmp_path))  # type: ignore[arg-type]
    head, dense, prune, *rest = capsys.readouterr().out.splitlines()
    assert head.split() == ["stage", "perplexity", "ratio", "KL", "top-1", "parameters", "bytes", "time", "of", "dense"]
    assert dense.split() == ["dense", "25.000", "1.000", "-", "-", "134,515,008", "256.6", "MiB", "-", "100.0%"]
    assert prune.split()[-7:] == ["216.2", "MiB", "1", "min", "15", "s", "84.3%"]
    assert rest[0] == f"result: {tmp_path}"  # whole, however long
    assert rest[1] == f"load:   transformers.AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r})"


def test_a_table_that_does_not_fit_is_printed_line_by_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setenv("COLUMNS", "50")
    Screen().result(FakeResult(tmp_path))  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage:", "dense"]
    assert "parameters: 113,364,288" in lines


def test_units_of_layers_that_differ_are_a_span(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().inspection({"model": "m", "groups": [{"group": "ffn", "units_per_layer": [640, 1536, 352]}]})
    assert capsys.readouterr().out.splitlines()[-1].split() == ["ffn", "352", "to", "1536"]


def test_what_a_model_is_called_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().inspection({"model": "[red]x[/red]", "bytes": 2048, "groups": [{"group": "[b]ffn", "units": 1536}]})
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out and "[b]ffn" in out and "1,536" in out and "2.0 KiB" in out
    assert "\x1b" not in out


def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(json=True).evaluation({"perplexity": float("nan"), "tokens": 3}, "m", "t")
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "tokens": 3}


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(quiet=True) as screen, screen.progress.task("x", 1) as task:
        task.advance()
        screen.progress.note("hidden")
    assert capsys.readouterr() == ("", "")
