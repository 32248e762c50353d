"""SIGTERM and Ctrl-C: one line, what is finished is kept, and the same command ends with the bytes of a whole run.

Two signals are no worse than one, a signal while modules are still being imported is no traceback, and whoever had the
handlers before has them afterwards.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from compress import cli, output, resume
from compress.checkpoint.ledger import Ledger
from compress.errors import interrupted
from tests import tiny
from tests.invariants.test_run import MOMENT, contents
from tests.kills import ROOT, forked

INSPECT = import_module("compress.inspect")  # as an attribute of compress it is the public function
LINES = ["--threads", "1", "--checkpoint-every", "0", "-q"]
RECIPE = """
model: {model}
data:
  calibration: {{samples: 4, length: 64}}
steps:
  - prune: {{ffn: 0.25}}
  - quantize: {{format: int8}}
evaluate: never
"""


@pytest.fixture(autouse=True, scope="module")
def heard() -> Iterator[None]:
    """Ctrl-C as in a terminal: in the background of a shell it is ignored, by the processes of the tests as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny.llama(folder / "model", num_hidden_layers=12)))
    return file


def bytes_of(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if name not in MOMENT}


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(["run", str(recipe), "-o", str(out), *LINES]) == 0
    return bytes_of(out)


@pytest.mark.parametrize(
    ("signals", "code", "word"),
    [
        ([signal.SIGTERM], 143, "terminated"),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGINT], 143, "terminated"),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted"),
    ],
)
def test_a_process_that_is_told_to_end_keeps_its_work(
    signals: list[int], code: int, word: str, recipe: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["run", str(recipe), "-o", str(out), *LINES]
    running = forked(arguments, log)
    give_up = time.monotonic() + 60
    while not list(output.work_of(out).glob("*.state")):  # the first layers are done
        assert running.poll() is None and time.monotonic() < give_up, log.read_text()
        time.sleep(0.002)
    for number in signals:
        if running.poll() is None:
            running.send_signal(number)
            time.sleep(0.05)
    assert running.wait(60) == code, log.read_text()
    error, hint = log.read_text().splitlines()
    assert error == f"error: {word}"
    assert hint.startswith("hint: finished work is kept in ") and f"to go on: autoglm-compress run {recipe}" in hint
    assert not out.exists() and output.work_of(out).exists()
    assert cli.main(arguments) == 0
    assert bytes_of(out) == whole


def at_first(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *numbers: int) -> None:
    """The first call of owner.name sends this process signals when it has done its work."""
    real, left = getattr(owner, name), list(numbers)

    def sending(*arguments: Any, **keywords: Any) -> Any:
        done = real(*arguments, **keywords)
        while left:
            os.kill(os.getpid(), left.pop(0))
        return done

    monkeypatch.setattr(owner, name, sending)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_cut_the_clean_up_short(
    second: int,
    recipe: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(recipe), "-o", str(out), *LINES]
    with monkeypatch.context() as patched:
        at_first(patched, Ledger, "save", signal.SIGTERM)
        at_first(patched, resume.Work, "kept", second)
        assert cli.main([*arguments, "--json"]) == 143
    said = capsys.readouterr()
    assert said.err.startswith("error: terminated\nhint: finished work is kept in ") and said.err.count("\n") == 2
    assert '"exit_code": 143' in said.out
    assert not out.exists()
    assert cli.main(arguments) == 0 and bytes_of(out) == whole


def test_a_signal_that_a_library_swallowed_can_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def stubborn(*_: object) -> dict[str, Any]:
        nonlocal calls
        for _number in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                calls += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return {"model": "m"}

    monkeypatch.setattr(INSPECT, "inspect_model", stubborn)
    assert cli.main(["inspect", "m", "-q"]) == 0 and calls == 1
    monkeypatch.setattr(cli, "GRACE", 0.0)
    assert cli.main(["inspect", "m", "-q"]) == 143 and calls == 3


def test_whoever_had_the_handlers_has_them_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[Any] = []

    def looks(*_: object) -> dict[str, Any]:
        inside.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        return {"model": "m"}

    def own(number: int, frame: object) -> None:
        del number, frame

    monkeypatch.setattr(INSPECT, "inspect_model", looks)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        signal.SIG_DFL,
    )
    assert cli.main(["inspect", "m", "-q"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        signal.SIG_DFL,
    )
    ours = inside.pop()
    assert all(callable(handler) for handler in ours) and signal.default_int_handler not in ours
    before = signal.signal(signal.SIGTERM, own)  # a caller's own handler is left in its place
    try:
        assert cli.main(["inspect", "m", "-q"]) == 0
        assert inside.pop()[1] is own and signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_handler_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(INSPECT, "inspect_model", lambda *_: {"model": "m"})
    thread = threading.Thread(target=lambda: codes.append(cli.main(["inspect", "m", "-q"])))
    thread.start()
    thread.join()
    assert codes == [0]


def fallback() -> None:
    """As libraries import what they may do without."""
    try:
        raise KeyboardInterrupt
    except BaseException:
        raise ImportError("cannot import name 'x'") from None


def test_ctrl_c_that_a_fallback_import_made_an_import_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(INSPECT, "inspect_model", lambda *_: fallback())
    assert cli.main(["inspect", "m", "-q"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not interrupted(ImportError("of its own"))
    circle = ImportError("of itself")
    circle.__context__ = RuntimeError("made by the other")
    circle.__context__.__context__ = circle
    assert not interrupted(circle)


# sends Ctrl-C from inside the import of a module, as the first that looks for it; a KeyboardInterrupt there is hidden,
# as fallback imports hide one
IN_IMPORT = """
import os, signal, sys

MODULE = sys.argv.pop(1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                print("went on", flush=True)
            except KeyboardInterrupt:
                raise ImportError(name)

sys.meta_path.insert(0, Finder())
from compress.__main__ import main
sys.exit(main())
"""


def in_import(module: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code and output of a command whose import of `module` meets Ctrl-C."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", IN_IMPORT, module, *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_while_the_command_itself_is_imported() -> None:
    assert in_import("compress.commands", "recipes") == (130, "", "error: interrupted\n")


def test_ctrl_c_inside_an_import_waits_for_its_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = tiny.llama(tmp_path / "model")
    options = ["--ratio", "0.2", "--samples", "4", "--length", "64", "--threads", "1", "-q"]
    module = "transformers.models.llama.modeling_llama"
    found = in_import(module, "prune", str(model), "-o", str(out), *options)
    assert found == (130, "went on\n", "error: interrupted\n")
    assert not out.exists()


def test_a_signal_that_waits_for_an_import_is_not_sent_to_whoever_comes_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "told.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def inspect_model(*_: object) -> dict[str, Any]:
        import_module("told")
        return {"model": "m"}

    monkeypatch.setattr(INSPECT, "inspect_model", inspect_model)
    monkeypatch.setattr(cli, "AGAIN", 0.3)
    assert cli.main(["inspect", "m", "-q"]) == 0
    time.sleep(0.4)  # SIGTERM would end this process


# the second signal of an import that takes long
TWICE = """
import sys
from importlib import import_module

from compress import cli

cli.GRACE = 0.0
import_module("compress.inspect").inspect_model = lambda *_: import_module("told")
sys.exit(cli.main(["inspect", "m", "-q"]))
"""


def test_a_second_signal_does_not_wait_for_an_import(tmp_path: Path) -> None:
    told = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGTERM)\nprint('on')\n"
    (tmp_path / "told.py").write_text(told)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "error: terminated\n")


IN_EXEC = """
import sys
from importlib import import_module

from compress.cli import main

def inspect_model(*_):
    exec("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")

import_module("compress.inspect").inspect_model = inspect_model
sys.exit(main(["inspect", "m", "-q"]))
"""


def test_sigterm_inside_generated_code_keeps_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(IN_EXEC)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    line = [sys.executable, "-m", "told"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "error: terminated\n")


def test_the_script_is_the_module_that_catches_it() -> None:
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"autoglm-compress": "compress.__main__:main"}
