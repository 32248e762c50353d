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
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from compress.commands import distill, evaluate, inspect, plan, prune, quantize, recipes, run
from compress.errors import (
    BUG,
    INTERRUPTED,
    MACHINE,
    OK,
    USAGE,
    CompressError,
    Interrupted,
    SelfCheckError,
    did_you_mean,
)

PROGRAM = "autoglm-compress"
_BROKEN_PIPE = 1  # as Python and Typer end when nobody reads on

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = any(argument in ("-v", "--verbose") for argument in given)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own progress is the one that is shown
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels that nothing here uses
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        try:
            code = get_command(app).main(args=given, prog_name=PROGRAM, standalone_mode=False)
            sys.stdout.flush()
            if code == INTERRUPTED:  # Typer turns ctrl-C into this code
                raise KeyboardInterrupt
            return code if isinstance(code, int) else OK
        except SystemExit as leave:  # Typer's own answer to a broken pipe
            return leave.code if isinstance(leave.code, int) else BUG
        except KeyboardInterrupt:
            return _fail("interrupted", None, INTERRUPTED)
        except Interrupted as stopped:
            again = shlex.join([PROGRAM, *(word for word in given if word != "--fresh")])
            return _fail("interrupted", f"{stopped.message}; to go on: {again}", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
            return _BROKEN_PIPE
        except Exception as error:
            return _report(error, verbose)


def _report(error: Exception, verbose: bool) -> int:
    if isinstance(error, SelfCheckError):
        return _fail(f"self-check failed, nothing was put in place: {error.message}", error.hint, error.exit_code)
    if isinstance(error, CompressError):
        return _fail(error.message, error.hint, error.exit_code)
    if isinstance(error, typer.Abort):
        return _fail("interrupted", None, INTERRUPTED)
    if hasattr(error, "format_message"):  # Typer's usage errors, whichever click it carries
        return _fail(usage(error), f"{_command(error)} --help", USAGE)
    if out_of_memory(error):
        return _fail(f"out of memory ({_first_line(error)})", "fewer --samples or a smaller --length", MACHINE)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(f"no space left for {error.filename or 'the result'}", None, MACHINE)
    if verbose:
        traceback.print_exception(error)
    what = f"{type(error).__name__}: {_first_line(error)}"
    return _fail(f"internal error: {what} (this is our bug; rerun with -v)", None, BUG)


def _fail(message: str, hint: str | None, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


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


def _command(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else PROGRAM


def out_of_memory(error: BaseException) -> bool:
    """Python's own MemoryError, or the RuntimeError that torch raises in its place."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error).lower() for word in words)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
