"""The command line: the Typer app, and what becomes of every error.

A mistake of the user or a limit of the machine is one `error:` line (and a `hint:`) on stderr with its exit code; a
traceback is shown only with -v, for what is our bug. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from compress.commands import distill, evaluate, inspect, plan, prune, quantize, recipes, run, sensitivity
from compress.errors import (
    BUG,
    INTERRUPTED,
    MACHINE,
    OK,
    TERMINATED,
    USAGE,
    CompressError,
    Interrupted,
    SelfCheckError,
    did_you_mean,
    interrupted,
    leave,
)
from compress.report import colours, in_json

PROGRAM = "autoglm-compress"
GRACE = 2.0  # seconds after a signal in which another one is taken for the same
AGAIN = 0.02  # seconds after which a signal that met an import is looked at again
_BROKEN_PIPE = 128 + signal.SIGPIPE  # as the shell sees others end when nobody reads on
_NO_MEMORY = (  # what messages of torch, of the system and of Python's threads say of it
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
)
_SMALLER = {  # what helps a command that ran out of memory
    "prune": "fewer --samples or a smaller --length",
    "sensitivity": "fewer --samples or a smaller --length",
    "evaluate": "fewer --samples or a smaller --length",
    "distill": "a smaller --batch or --length",
    "run": f"{PROGRAM} plan shows what every step needs",
}

app = typer.Typer(
    name=PROGRAM,
    help="Make a model checkpoint smaller: prune, distill, quantize, and a receipt that says why to trust it.",
    epilog="Example:\n\nautoglm-compress run demo",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import compress

        print(f"{PROGRAM} {compress.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version  # its callback has ended the program
    _help_alone(context)


def _help_alone(context: typer.Context) -> None:
    """Without a command: the help page, which is no mistake."""
    if context.invoked_subcommand is None:
        print(context.get_help())


_group = typer.Typer()
_group.callback(invoke_without_command=True)(_help_alone)

_COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (inspect.inspect, inspect.EXAMPLE),
    (plan.plan, plan.EXAMPLE),
    (run.run, run.EXAMPLE),
    (prune.prune, prune.EXAMPLE),
    (distill.distill, distill.EXAMPLE),
    (quantize.quantize, quantize.EXAMPLE),
    (evaluate.evaluate, evaluate.EXAMPLE),
    (sensitivity.sensitivity, sensitivity.EXAMPLE),
)
for _function, _example in _COMMANDS:
    app.command(_function.__name__, epilog=f"Example:\n\n{_example}")(_function)
for _name, _function, _example in recipes.COMMANDS:
    _group.command(_name, epilog=f"Example:\n\n{_example}")(_function)
app.add_typer(
    _group,
    name="recipes",
    help="The recipes that are known by name: list, show, copy; the schema of a recipe.",
    epilog="Example:\n\nautoglm-compress recipes list",
)


@cache
def _parser() -> Any:
    """Made once a process: Typer needs longer for it than for anything it parses."""
    return get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(argument in ("-v", "--verbose") for argument in given)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress is the one that is shown
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels that nothing here uses
    if colours() is None:
        from typer import rich_utils  # the pages of --help

        rich_utils.COLOR_SYSTEM = None
    with _Signals() as signals, warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            code = _parser().main(args=given, prog_name=PROGRAM, standalone_mode=False)
            sys.stdout.flush()
            if code == INTERRUPTED:  # Typer turns ctrl-C into this code
                raise KeyboardInterrupt
            return code if isinstance(code, int) else OK
        except SystemExit:  # Typer's own answer to a broken pipe
            return _BROKEN_PIPE
        except BrokenPipeError:
            return _nobody_reads()
        except (Exception, KeyboardInterrupt) as error:
            end = _end(error, given, signals.end)
            if verbose and end.code == BUG and not isinstance(error, CompressError):
                traceback.print_exception(error)
            return _tell(end, "--json" in given)


class _Stopped(KeyboardInterrupt):
    """Not KeyboardInterrupt itself: where that has left an `exec`, `python -m` ends by SIGINT, whatever we return."""


class _Signals:
    """While a command runs, SIGTERM is told like Ctrl-C: both raise KeyboardInterrupt, and what is finished is kept.

    A second signal within GRACE seconds is dropped: people press twice and timeout(1) sends two, and neither may cut
    the clean-up short that the first one began. One that meets an import waits for its end: cut short, a package looks
    missing, or crashes when it is imported again; only a second one, later, ends the process at once. Only in the main
    thread, and only where nobody else handles the signal.
    """

    def __init__(self) -> None:
        self.end = ("interrupted", INTERRUPTED)
        self._raised: float | None = None
        self._before: list[tuple[int, Any]] = []
        self._met: float | None = None  # when a signal met an import

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
            for number, handler in {signal.SIGALRM: signal.SIG_DFL, **usual}.items():
                if signal.getsignal(number) == handler:
                    self._before.append((number, signal.signal(number, self._stop if number in usual else self._again)))
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGALRM) == self._again:
            signal.setitimer(signal.ITIMER_REAL, 0)
        while self._before:
            signal.signal(*self._before.pop())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._raised is not None and now - self._raised < GRACE:
            return
        self.end = ("terminated", TERMINATED) if number == signal.SIGTERM else ("interrupted", INTERRUPTED)
        if signal.getsignal(signal.SIGALRM) != self._again:
            self._raise()
        if self._met is not None and now - self._met >= GRACE and _importing(frame):
            leave(*self.end)  # as one that is killed: what is finished is kept all the same
        self._met = now if self._met is None else self._met
        self._again(number, frame)

    def _again(self, number: int, frame: FrameType | None) -> None:
        del number
        if self._met is None:
            return
        if _importing(frame):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            self._raise()

    def _raise(self) -> NoReturn:
        self._raised, self._met = time.monotonic(), None
        raise _Stopped


def _importing(frame: FrameType | None) -> bool:
    """Whether `main` is in the middle of an import at `frame`."""
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class _End:
    """How a command ended that was not done: the lines for people, the exit code, and what it found all the same."""

    message: str
    hint: str | None
    code: int
    document: Mapping[str, Any] = field(default_factory=dict)


def _end(error: BaseException, given: Sequence[str], stopped: tuple[str, int]) -> _End:
    """What becomes of `error`. `stopped`: word and exit code where it is a signal."""
    if isinstance(error, Interrupted):
        again = shlex.join([PROGRAM, *(word for word in given if word != "--fresh")])
        return _End(stopped[0], f"{error.message}; to go on: {again}", stopped[1])
    if interrupted(error) or isinstance(error, typer.Abort):
        return _End(stopped[0], None, stopped[1])
    if isinstance(error, SelfCheckError):
        return _End(f"self-check failed, nothing was put in place: {error.message}", error.hint, error.exit_code)
    if isinstance(error, CompressError):
        return _End(error.message, error.hint, error.exit_code, error.document)
    if hasattr(error, "format_message"):  # Typer's usage errors, whichever click it carries
        return _End(usage(error), f"{_command(error)} --help", USAGE)
    if out_of_memory(error):
        return _End(f"out of memory ({_first_line(error)})", _SMALLER.get(_verb(given)), MACHINE)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _End(f"no space left for {error.filename or 'the result'}", None, MACHINE)
    what = f"{type(error).__name__}: {_first_line(error)}"
    return _End(f"internal error: {what} (this is our bug; rerun with -v)", None, BUG)


def _tell(end: _End, as_json: bool) -> int:
    """One line and a hint on stderr; with --json one document on stdout besides."""
    print(f"error: {end.message}", file=sys.stderr)
    if end.hint:
        print(f"hint: {end.hint}", file=sys.stderr)
    if as_json:
        error = {"message": end.message, "hint": end.hint, "exit_code": end.code}
        try:
            print(in_json({**end.document, "error": error}), flush=True)
        except BrokenPipeError:
            _nobody_reads()
    return end.code


def _nobody_reads() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
    return _BROKEN_PIPE


def usage(error: Any) -> str:
    """A usage error as one line that names the flag and, for an unknown one, the nearest."""
    context: Any = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if option is not None and type(error).__name__ == "NoSuchOption":
        known = [name for param in context.command.params for name in param.opts if name.startswith("--")]
        return f"{option}: no such option{did_you_mean(option, known)}"
    param = getattr(error, "param", None)
    if param is not None:
        name = param.metavar if param.param_type_name == "argument" else param.opts[0]
        if type(error).__name__ == "MissingParameter":
            return f"{name}: missing, required"
        return f"{name}: {str(error.message).rstrip('.')}"
    unknown = re.match(r"No such command '([^']*)'", error.message)
    if unknown and context is not None:
        return f"no such command '{unknown[1]}'{did_you_mean(unknown[1], context.command.commands)}"
    return " ".join(str(error.format_message()).split()).rstrip(".")


def _verb(given: Sequence[str]) -> str:
    return next((word for word in given if not word.startswith("-")), "")


def _command(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else PROGRAM


def out_of_memory(error: BaseException) -> bool:
    """Python's own MemoryError, or the RuntimeError that torch raises in its place."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error).lower() for word in _NO_MEMORY)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
