"""What people see: progress on stderr, results on stdout, as tables or as one JSON document.

A terminal gets bars with the time that is left; a log gets a plain line every few seconds. Colour only where a
terminal wants it (NO_COLOR leaves no bold either); a table that does not fit is printed one `key: value` a line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from compress.arch import described
from compress.card import auto_class
from compress.checkpoint.per_layer import is_per_layer, span
from compress.errors import CompressError, size
from compress.machine import Progress, Silent
from compress.progress import BarProgress, LogProgress, duration, plain
from compress.receipt import changes, finite

if TYPE_CHECKING:
    from compress.plan import Plan
    from compress.run import Result

LOG_WIDTH = 160  # columns of a table where nothing says how wide the screen is


def colours() -> Literal["auto"] | None:
    """What a rich Console may use; with NO_COLOR nothing, where rich alone would leave bold and dim."""
    return None if os.environ.get("NO_COLOR") else "auto"


class Screen(AbstractContextManager["Screen"]):
    """The flags --json, -q and -v, and what they make of progress, plans and results."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self._json, self._quiet = json, quiet
        err = Console(stderr=True, color_system=colours())
        fits = Console().is_terminal or "COLUMNS" in os.environ
        self._out = Console(width=None if fits else LOG_WIDTH, color_system=colours())
        self._live: BarProgress | LogProgress | None = None
        if not quiet:
            bars = err.is_terminal and not err.is_dumb_terminal
            self._live = BarProgress(err, verbose) if bars else LogProgress(err, verbose)
        self.progress: Progress = self._live or Silent()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def plan(self, made: Plan) -> None:
        """A row a step; below it why, and what the machine needs."""
        if self._json:
            return self._document(made.as_dict())
        sizes, layers = made.family.sizes(made.before), made.family.layers(made.before)
        ffn, heads = span([each.ffn for each in layers]), span([each.heads for each in layers])
        what = f"{made.family.model_type}, {sizes.layers} layers, FFN {ffn}, heads {heads}/{sizes.kv_heads}"
        rows = [["source", what, f"{made.parameters:,}", size(made.before.nbytes), "", ""]]
        for index, step in enumerate(made.steps):
            what, needs = changes(step), [size(step.memory), size(made.disk_of(index))]
            rows.append([f"{index + 1} {step.kind}", what, f"{step.parameters:,}", size(step.nbytes), *needs])
        columns = ["step", "what", "parameters", "bytes", "peak memory", "disk"]
        width = len(columns) if made.memory is not None else len(columns) - 2
        self._pair("model", made.source.name)
        if made.teacher is not None and made.teacher != made.source:
            self._pair("teacher", made.teacher.name)
        self._table(columns[:width], [row[:width] for row in rows], left=2)
        told = [*made.notes, *(f"{step.kind}: {note}" for step in made.steps for note in step.notes)]
        for note in () if self._quiet else told:
            plain(self._out, f"  {note}")
        for step in made.steps if self._quiet else ():  # the notes say it too, and what it leaves out
            if (loss := getattr(step, "predicted_loss", None)) is not None:
                plain(self._out, f"predicted rise of the loss: {loss:.4f} nats a token")
        plain(self._out, f"KV cache: {' -> '.join(f'{each:,}' for each in made.kv_cache)} bytes a token")
        if made.memory is not None and made.disk is not None:
            beside = "memory beside Python and its libraries (about 400 MiB)"
            plain(self._out, f"needs about {size(made.memory)} of {beside} and {size(made.disk)} of disk")

    def result(self, result: Result, failed: CompressError | None = None) -> None:
        """A row a stage, where the result is, and how to load it. `failed`: what is raised next."""
        if self._json:
            receipt, measured = result.receipt, result.measured
            document = {"out": str(result.out), "stages": list(result.stages), "receipt": receipt, "measured": measured}
            return self._document(document, failed)
        dense = next((stage for stage in result.stages if stage["stage"] == "dense"), {})
        keys = [key for key in _STAGE if any(stage.get(key) is not None for stage in result.stages)]
        rows = [[_STAGE[key](stage.get(key)) for key in keys] for stage in result.stages]
        if dense:
            rows = [[*row, _share(stage, dense)] for row, stage in zip(rows, result.stages, strict=True)]
        self._table([_NAMES.get(key, key) for key in keys] + ["of dense"] * bool(dense), rows)
        plain(self._out, f"result: {result.out}")
        plain(self._out, f"load:   {how_to_load(result.out)}")

    def inspection(self, found: Mapping[str, Any]) -> None:
        """One `key: value` a line, a table of what can be cut, and one of who loads what is left."""
        if self._json:
            return self._document(found)
        tables = [found.get("groups") or (), [_told_cut(cut) for cut in found.get("cuts") or ()]]
        for key, value in found.items():
            if key not in ("groups", "cuts") and value is not None:
                self._pair(key, value)
        for rows in filter(None, tables):
            plain(self._out)
            columns = list(dict.fromkeys(key for row in rows for key in row))
            body = [[_cell(key, row.get(key)) for key in columns] for row in rows]
            self._table([_name(column) for column in columns], body)

    def evaluation(
        self, found: Mapping[str, Any], model: str, reference: str | None, failed: CompressError | None = None
    ) -> None:
        """One `key: value` a line. `failed`: what is raised next."""
        if self._json:
            return self._document(found, failed)
        self._pair("model", model)
        if reference is not None:
            self._pair("reference", reference)
        for key, value in found.items():
            self._pair(key, value)

    def recipes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A row a recipe: its name, its steps, what it is."""
        if self._json:
            return self._document(rows)
        columns = ("name", "steps", "what")
        self._table(columns, [[_cell(key, row[key]) for key in columns] for row in rows], left=len(columns))

    def yaml(self, text: str) -> None:
        """A recipe as it stands in its file, byte for byte where no person looks on; coloured on a terminal."""
        if not self._out.is_terminal:
            sys.stdout.buffer.write(text.encode())  # whatever the locale
            return
        from rich.syntax import Syntax

        shown = Syntax("", "yaml", theme="ansi_dark", background_color="default").highlight(text)
        self._out.print(shown, end="", soft_wrap=True)

    def said(self, found: Mapping[str, Any], *lines: str | Text, result: bool = False) -> None:
        """What was done, as lines; or a `result`, which is what was asked for and comes with -q too."""
        if self._json:
            return self._document(found)
        for line in () if self._quiet and not result else lines:
            plain(self._out, line)

    def rows(
        self,
        found: Any,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *lines: str,
        failed: CompressError | None = None,
    ) -> None:
        """A table, and lines below it; `found`: the same as a JSON document. `failed`: what is raised behind it."""
        if self._json:
            return self._document(found if failed is None or isinstance(found, Mapping) else {"rows": found}, failed)
        self._table(columns, rows)
        for line in lines:
            plain(self._out, line)

    def _document(self, value: Any, failed: CompressError | None = None) -> None:
        """Print it; with an error it goes into the error's document, for stdout holds one."""
        if failed is None:
            print(in_json(value))
        else:
            failed.document = value

    def _pair(self, key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            value = ", ".join(f"{_name(k)} {_cell(k, v)}" for k, v in value.items())
        plain(self._out, f"{_name(key) + ':':<22}{_cell(key, value)}")

    def _table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if Measurement.get(self._out, self._out.options.update(width=10_000), table).maximum <= self._out.width:
            self._out.print(table)
            return
        wide = max(map(len, columns)) + 2
        for row in rows:
            for column, cell in zip(columns, row, strict=True):
                plain(self._out, f"{column + ':':<{wide}}{cell}")
            plain(self._out)


def in_json(value: Any) -> str:
    """Strict JSON; what it has no number for (infinity) is null."""
    return json.dumps(finite(value), indent=2, default=str)


def how_to_load(folder: Path) -> str:
    """The line of Python that loads a folder with stock transformers, or who does where that one does not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = described(config)
    if family.stock is not None:
        return f"{' and '.join(family.loaders)}, while it is unquantized; stock transformers does not load this flavour"
    trusted = ", trust_remote_code=True" if is_per_layer(config) else ""
    return f"transformers.{auto_class(config)}.from_pretrained({str(folder)!r}{trusted})"


def _number(format: str) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else format.format(value)


_STAGE: dict[str, Callable[[Any], str]] = {
    "stage": str,
    "perplexity": _number("{:.3f}"),
    "perplexity_ratio": _number("{:.3f}"),
    "kl": _number("{:.4f}"),
    "top1_agreement": _number("{:.1%}"),
    "parameters": _number("{:,}"),
    "bytes": lambda value: "-" if value is None else size(value),
    "seconds": lambda value: "-" if value is None else duration(value),
}
_NAMES = {"perplexity_ratio": "ratio", "kl": "KL", "top1_agreement": "top-1", "seconds": "time"}


def _share(stage: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    part, whole = stage.get("bytes"), dense.get("bytes")
    return f"{part / whole:.1%}" if part is not None and whole else "-"


def _name(key: str) -> str:
    return key.replace("_", " ")


def _cell(key: str, value: Any) -> str:
    if key == "N":
        return "any" if value is None else _runs(value)
    if key == "units_per_layer":
        return span(value if isinstance(value, list) else [value])
    shown = _STAGE.get(key.removeprefix("reference_"))
    if shown is not None and not isinstance(value, str):
        return shown(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def _told_cut(cut: Mapping[str, Any]) -> dict[str, Any]:
    """A cut of `inspect` as a row: the option as it is typed."""
    options = {cut["option"]: "N", **cut["besides"]}
    typed = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    return {"option": typed, "N": cut["keep"], "written as": cut["model_type"], "loaded by": cut["loaded_by"]}


def _runs(counts: Sequence[int]) -> str:
    """Ascending counts; of four and more at equal distances the ends: 1-29, or 2, 4, ..., 30."""
    runs: list[list[int]] = []
    for count in counts:
        run = runs[-1] if runs else []
        if run and (len(run) == 1 or count - run[-1] == run[1] - run[0]):
            run.append(count)
        else:
            runs.append([count])

    def told(run: Sequence[int]) -> str:
        if len(run) < 4:
            return ", ".join(map(str, run))
        return f"{run[0]}-{run[-1]}" if run[1] == run[0] + 1 else f"{run[0]}, {run[1]}, ..., {run[-1]}"

    return ", ".join(map(told, runs))
