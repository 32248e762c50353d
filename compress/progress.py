"""Progress on stderr: bars with the time that is left on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from compress.machine import Task

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

EVERY = 5.0  # seconds between two lines about one task in a log
WORTH_A_LINE = 1.0  # seconds below which a finished task leaves no line


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class LogTask:
    """A task of a log: a line when the last one is `EVERY` seconds old, with the time that is left."""

    def __init__(self, label: str, total: int, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._label, self._total, self._say, self._clock = label, total, say, clock
        self._done, self._earlier, self._start = 0, 0, clock()
        self._last = self._start

    def advance(self, by: int = 1, earlier: bool = False) -> None:
        self._done += by
        self._earlier += by if earlier else 0
        now, here = self._clock(), self._done - self._earlier
        if now - self._last >= EVERY and here > 0 and self._done < self._total:
            left = (now - self._start) * (self._total - self._done) / here
            spent = duration(now - self._start)
            self._say(f"{self._label}: {self._done}/{self._total}, {spent}, about {duration(left)} left")
            self._last = now


class LogProgress:
    """Progress as plain lines, for stderr that is not a terminal."""

    def __init__(self, console: Console, verbose: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._verbose, self._clock = console, verbose, clock

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        start = self._clock()
        yield LogTask(label, total, self.note, self._clock)
        seconds = self._clock() - start
        if self._verbose or seconds >= WORTH_A_LINE:
            self.note(f"{label}: done, {duration(seconds)}")

    def note(self, line: str) -> None:
        plain(self._console, line)

    def stop(self) -> None:
        """Nothing is shown that would have to be taken down."""


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, by: int = 1, earlier: bool = False) -> None:
        if earlier:
            self._bars.reset(self._task, completed=by)  # the pace is that of what follows
        else:
            self._bars.advance(self._task, by)


class BarProgress:
    """Progress as bars with elapsed and remaining time; a finished task that took a second leaves one line."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        from rich import progress

        self._console, self._verbose, self._open = console, verbose, 0
        columns: list[progress.ProgressColumn] = [progress.TextColumn("{task.description}", markup=False)]
        if console.width >= 60:
            columns.append(progress.BarColumn(bar_width=None))
        columns += [progress.MofNCompleteColumn(), progress.TimeElapsedColumn()]
        if console.width >= 80:
            columns += [progress.TextColumn("left"), progress.TimeRemainingColumn(elapsed_when_finished=False)]
        self._bars = progress.Progress(*columns, console=console, transient=True, refresh_per_second=4)

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        start = time.monotonic()
        if not self._open:
            self._bars.start()
        self._open += 1
        bar = self._bars.add_task(label, total=total)
        try:
            yield _Bar(self._bars, bar)
            seconds = time.monotonic() - start
            if self._verbose or seconds >= WORTH_A_LINE:
                self.note(f"{label}: {duration(seconds)}")
        finally:
            self._bars.remove_task(bar)
            self._open -= 1
            if not self._open:
                self._bars.stop()

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bars down, so that an error line stands alone."""
        self._bars.stop()


def plain(console: Console, line: str | Text = "") -> None:
    """One line as it is: no markup, no colour guessed from its words, no wrapping in a log."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
