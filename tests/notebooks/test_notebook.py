"""The notebooks run from first to last cell on pico models, call compress alone, and store no output."""

from __future__ import annotations

import ast
import base64
import io
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import compress
from compress.machine import Machine
from tests import tiny

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALLOWED = {"compress", "os", "pathlib"}
DATA = {"samples": 6, "length": 64}


def code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["01-sensitivity.ipynb", "02-pruning-choices.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_valid_and_stores_no_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_imports_compress_alone(path: Path) -> None:
    imported = set()
    for source in code(nbformat.read(path, as_version=4)):
        for node in ast.walk(ast.parse(source)):  # a line magic is not Python and fails here
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
            assert not (isinstance(node, ast.Name) and node.id in ("__import__", "exec", "eval"))
    assert "compress" in imported and imported <= ALLOWED


def execute(name: str, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, result: Path | None = None) -> Any:
    """Run a notebook in `folder` on the model `source` and a pruned result; CellExecutionError if a cell fails."""
    monkeypatch.setenv("AUTOGLM_COMPRESS_MODEL", str(source))
    monkeypatch.setenv("AUTOGLM_COMPRESS_SENSITIVITY", str(folder / "measured"))
    monkeypatch.setenv("AUTOGLM_COMPRESS_SAMPLES", "8")
    monkeypatch.setenv("AUTOGLM_COMPRESS_RESULT", str(result))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook: Any, kind: str) -> dict[str, Any]:
    """What cells returned of a MIME type, by cell id."""
    return {
        cell.id: output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type in ("execute_result", "display_data") and kind in output.data
    }


def drawn(notebook: Any, expected: set[str]) -> None:
    """The cells that show a picture, none of them blank."""
    pictures = outputs(notebook, "image/png")
    assert set(pictures) == expected
    for name, data in pictures.items():
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))[..., :3]
        assert min(pixels.shape[:2]) > 150 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, name


def said(notebook: Any) -> dict[str, str]:
    """What cells printed, by cell id."""
    found: dict[str, str] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                found[cell.id] = found.get(cell.id, "") + output.text
    return found


def test_choices_are_planned_carried_out_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.llama(tmp_path / "source")
    notebook = execute("02-pruning-choices.ipynb", source, tmp_path, monkeypatch)
    drawn(notebook, {"plot-predicted", "plot-cut"})
    printed = said(notebook)
    assert set(printed) == {"write-recipe", "plan-budgets", "plan-ways", "carry-out"}
    losses = [float(line.split()[-2]) for line in printed["plan-budgets"].splitlines()[1:]]
    assert len(losses) == 4 and 0 < losses[0] < losses[-1] and losses == sorted(losses)
    assert printed["plan-ways"].count("nats a token") == 3 and printed["carry-out"].count("->") == 2


def test_it_runs_and_draws_on_heads_and_ffn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.llama(tmp_path / "source")
    compress.prune(source, tmp_path / "out", ratio=0.3, heads=0.5, data=DATA, machine=Machine(1))
    notebook = execute("01-sensitivity.ipynb", source, tmp_path, monkeypatch, tmp_path / "out")
    measured = {"plot-losses-heads", "plot-losses-ffn", "plot-layers"}
    drawn(notebook, measured | {"plot-heads", "plot-curves", "plot-cut"})
    assert set(outputs(notebook, "text/html")) == {"kv-groups", "layers", "units"}
    assert said(notebook) == {}  # no stray logs or warnings between prose and pictures
    assert "heads 8 -> 4" in outputs(notebook, "text/plain")["load"]


def test_it_runs_where_only_the_ffn_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.glm4v(tmp_path / "source")
    compress.prune(source, tmp_path / "out", ffn=0.25, data=DATA, machine=Machine(1))
    compress.measure_sensitivity(source, tmp_path / "measured", data=DATA, machine=Machine(1), pictures=False)
    notebook = execute("01-sensitivity.ipynb", source, tmp_path, monkeypatch, tmp_path / "out")
    assert {"plot-curves", "plot-cut"} <= set(outputs(notebook, "image/png"))
    assert outputs(notebook, "text/plain")["plot-heads"] == "'no heads were cut'"
