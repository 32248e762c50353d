"""`recipes list | show | copy | schema`, shipped names from any folder, and a wheel that holds what they read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.commands.recipes import about
from compress.recipe import load
from compress.recipe_schema import modeline, schema_text
from tests import tiny

ROOT = Path(recipes.__file__).parent.parent
SHIPPED = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.stem)}
LINE = modeline("schema.json") + "\n"
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """The same, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return main


def test_the_list_names_every_recipe_with_its_steps_and_what_it_is(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a table that does not fit is printed otherwise
    code, out, err = main("recipes", "list", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(SHIPPED)
    for row in rows:
        read = load(SHIPPED[row["name"]])
        assert (row["steps"], row["model"]) == ([step.kind for step in read.steps], read.model)
        assert row["what"] and row["what"] in SHIPPED[row["name"]].read_text().splitlines()[0]
        assert load(row["file"]) == read
    shown = main("recipes", "list")[1].splitlines()
    assert shown[0].split() == ["name", "steps", "what"]
    assert [line.split()[0] for line in shown[1:]] == list(SHIPPED)


def test_own_recipes_are_listed_and_a_broken_one_says_so(main: Main, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(LINE + "# what mine does\nmodel: m\nsteps: [prune]\n")
    (tmp_path / "recipes" / "broken.yaml").write_text("modle: m\n")
    rows = {row["name"]: row for row in json.loads(main("recipes", "list", "--json")[1])}
    assert (rows["mine"]["what"], rows["mine"]["file"]) == ("what mine does", "recipes/mine.yaml")
    assert rows["broken"]["what"].startswith("no recipe: recipes/broken.yaml: 3 problems")
    assert (rows["broken"]["model"], rows["broken"]["steps"]) == (None, [])
    assert "broken" in main("recipes", "list")[1]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# autoglm-compress run x     Does it all\nmodel: m\n", "Does it all"),
        ("#\n#  Does it all \n", "Does it all"),
        (LINE + "# Does it all\n", "Does it all"),
        ("model: m\n# later\n", ""),
        ("", ""),
    ],
)
def test_what_a_recipe_is_stands_in_its_first_comment(text: str, what: str) -> None:
    assert about(text) == what


@pytest.mark.parametrize("name", SHIPPED)
def test_show_gives_the_very_bytes_in_a_pipe(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compress", "recipes", "show", name]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "LC_ALL": "C"})
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", SHIPPED[name].read_bytes())


def test_show_colours_on_a_terminal_and_says_the_same(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    out = main("recipes", "show", "demo")[1]
    assert "\x1b[" in out
    from rich.text import Text

    assert Text.from_ansi(out).plain.strip() == SHIPPED["demo"].read_text().strip()  # no line was cut or wrapped


def test_show_as_json_is_the_whole_recipe(main: Main) -> None:
    document = json.loads(main("recipes", "show", "demo", "--json")[1])
    assert document["recipe"] == load("demo").model_dump(mode="json")


def test_copy_writes_a_recipe_that_loads_and_replaces_nothing_unasked(main: Main, tmp_path: Path) -> None:
    code, out, err = main("recipes", "copy", "demo")
    assert (code, err) == (0, "")
    assert "wrote demo.yaml; to run it: autoglm-compress run demo.yaml" in out
    copied = tmp_path / "demo.yaml"
    # no schema lies beside it: a line that names one would be a lie
    assert LINE in SHIPPED["demo"].read_text() and copied.read_text() == SHIPPED["demo"].read_text().replace(LINE, "")
    assert load(copied) == load(SHIPPED["demo"])
    copied.write_text("mine")
    code, out, err = main("recipes", "copy", "demo")
    assert (code, out, err.splitlines()[0]) == (2, "", "error: demo.yaml: exists already")
    assert copied.read_text() == "mine"
    assert main("recipes", "copy", "demo", "--overwrite", "-q")[:2] == (0, "")
    assert main("recipes", "copy", "demo", "-o", str(tmp_path))[0] == 2
    assert main("recipes", "copy", "demo", "-o", "new/folder/x.yaml")[0] == 0
    assert load("new/folder/x.yaml") == load(SHIPPED["demo"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.yaml", "new"]


def test_copy_keeps_the_line_for_editors_where_it_is_true(main: Main, tmp_path: Path) -> None:
    assert main("recipes", "schema", "-o", "schema.json")[1].endswith(f"names it: {LINE}")
    assert (tmp_path / "schema.json").read_text() == schema_text() == main("recipes", "schema")[1]
    assert main("recipes", "copy", "demo")[0] == 0
    assert (tmp_path / "demo.yaml").read_text() == SHIPPED["demo"].read_text()
    (tmp_path / "schema.json").write_text("{}")  # some other schema: not what the line means
    assert main("recipes", "copy", "demo", "--overwrite")[0] == 0
    assert LINE not in (tmp_path / "demo.yaml").read_text()
    assert main("recipes", "schema", "-o", "schema.json")[0] == 2
    assert (tmp_path / "schema.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["shwo"], "no such command 'shwo'; did you mean 'show'?"),
        (["show"], "RECIPE: missing, required"),
        (["show", "dmeo"], "dmeo: no such recipe; did you mean "),
        (["copy", "dmeo"], "dmeo: no such recipe; did you mean "),
        (["copy", "demo", "--ovewrite"], "--ovewrite: no such option; did you mean '--overwrite'?"),
        (["schema", "-o", "/proc/none/schema.json"], "/proc/none/schema.json: cannot be written"),
        (["list", "-q", "-v"], "-q and -v exclude each other"),
    ],
)
def test_wrong_input_is_one_line(main: Main, arguments: list[str], line: str) -> None:
    code, out, err = main("recipes", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}") and len(err.splitlines()) <= 2


def test_a_shipped_name_is_planned_and_run_anywhere(main: Main, tmp_path: Path) -> None:
    model = ["--set", f"model={tiny.glm4v(tmp_path / 'model')}", "--threads", "1"]
    assert main("plan", "glm4v-tiny-ci", "--no-machine", *model)[0] == 0
    code, _, err = main("run", "glm4v-tiny-ci", "-q", *model, "--set", "steps.1.max_steps=1")
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "glm4v-tiny-ci" / "receipt.json").is_file()


def test_the_wheel_holds_recipes_and_schema(tmp_path: Path) -> None:
    """Built by the backend that pip calls, from a copy: a build leaves folders behind."""
    for name in ("compress", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    script = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if n.startswith("compress/_recipes/")}
        assert held == {f"compress/_recipes/{path.name}" for path in (*SHIPPED.values(), ROOT / "recipes/schema.json")}
        assert archive.read("compress/_recipes/schema.json").decode() == schema_text()
        assert "compress/py.typed" in archive.namelist()
