"""Help: there for every command, quick, with an example that the command takes, and options that are the recipe's."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from compress import cli
from compress.steps import STEPS
from tests import tiny

COMMANDS = ["inspect", "plan", "run", "prune", "distill", "quantize", "evaluate", "sensitivity", "recipes"]
PAGES = [*COMMANDS[:-1], *(f"recipes {name}" for name in ("list", "show", "copy", "schema"))]
ROOT = Path(cli.__file__).parent.parent


def run(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, without a terminal."""
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "compress", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def spent(work: Callable[[], subprocess.CompletedProcess[str]]) -> float:
    """Processor seconds of the processes that `work` waits for, the least of three: other tests run meanwhile."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = work()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and not done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


def test_help_takes_under_half_a_second_of_processor_time() -> None:
    libraries = [sys.executable, "-c", "import typer.rich_utils, pydantic, yaml"]
    if (taken := spent(lambda: run("--help"))) >= 0.5:  # or, on a slow machine, three times what its libraries take
        assert taken < 3 * spent(lambda: subprocess.run(libraries, capture_output=True, text=True, check=False))


def test_help_lists_every_command_and_no_command_is_help() -> None:
    said = run("--help").stdout
    assert all(f" {name} " in said for name in COMMANDS)
    assert run().stdout == said
    assert run("recipes").stdout == run("recipes", "--help").stdout
    assert list(get_command(cli.app).commands) == COMMANDS  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_each_help_ends_with_an_example_that_the_command_takes(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*page.split(), "--help"]) == 0
    said = capsys.readouterr().out
    title, example = [line.strip() for line in said.splitlines() if line.strip()][-2:]
    assert title == "Example:"  # so the example is one line, at 80 columns, ready to copy
    assert example.startswith(f"autoglm-compress {page}")
    parser = get_command(cli.app)
    for name in page.split():
        parser = parser.commands[name]  # type: ignore[attr-defined]
    arguments = shlex.split(example)[1 + len(page.split()) :]
    parser.make_context(page, arguments)  # raises a usage error for whatever it does not take
    assert "--quiet" in said and "--verbose" in said and "--json" in said


@pytest.mark.parametrize("name", list(STEPS))
def test_a_steps_flags_are_the_keys_of_its_options(name: str) -> None:
    command = get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    params = {param.name: param for param in command.params}
    for key, field in STEPS[name].options.model_fields.items():
        param = params[key]
        assert param.opts == ["--" + key.replace("_", "-")]
        assert param.required == field.is_required()
        assert param.help.replace("\\[", "[").removesuffix(" May be repeated." * param.multiple) == field.description
        assert field.is_required() or str(param.default) == str(field.default)
        if field.annotation is bool:
            assert param.secondary_opts == ["--no-" + key.replace("_", "-")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["prune", "--help"],
        ["plan", "MISSING"],
        ["plan", "glm4v-tiny-ci"],
        ["run", "glm4v-tiny-ci", "--dry-run"],
    ],
)
def test_help_and_plan_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from compress.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'bitsandbytes'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if "glm4v-tiny-ci" in arguments:
        tiny.glm4v(tmp_path / "out" / "glm4v-tiny")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert "imported" not in done.stderr
    assert done.returncode == (2 if "MISSING" in arguments else 0), done.stderr


def test_version() -> None:
    assert run("--version").stdout.startswith("autoglm-compress ")


@pytest.mark.parametrize("arguments", [("--help",), ("recipes", "list"), ("recipes", "list", "--json")])
def test_who_reads_no_further_ends_it_as_any_program(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "compress", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
