"""A sensitivity folder is read whole or refused in one line: every file error, and every array that makes no sense."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compress.curves import DOCUMENT, TENSORS, read_curves
from compress.errors import UserError

UNITS = {"heads": (4, 2, 8), "ffn": (16, 16, 1)}  # units, balance, width


def write(folder: Path, layers: int = 2, groups: dict[str, tuple[int, int, int]] = UNITS) -> Path:
    """A small folder by hand: costs ascend with the unit, each unit loses as much as its number."""
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        for name, (units, _, _) in groups.items():
            prefix, removed = f"layers.{layer}.{name}", np.arange(0, units, units // 4, dtype=np.int32)
            tensors[f"{prefix}.cost"] = np.arange(units, dtype=np.float32)
            tensors[f"{prefix}.order"] = np.arange(units, dtype=np.int32)
            tensors[f"{prefix}.loss"] = np.arange(units, dtype=np.float64)
            tensors[f"{prefix}.curve.removed"] = removed
            tensors[f"{prefix}.curve.loss"] = removed.astype(np.float64) * (layer + 1)
            tensors[f"{prefix}.curve.error"] = removed / units
        for kind in ("cost", "loss"):
            tensors[f"layers.{layer}.kv.{kind}"] = np.ones(groups["heads"][0] // groups["heads"][1])
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS)
    about = {
        "format": 1,
        "model": {"digest": "0" * 64, "name": "model"},
        "criterion": "obs",
        "damping": 0.01,
        "calibration": {"source": {"self": 0.5, "text.txt": 0.5}, "tokens": 64},
        "groups": {
            name: {**dict(zip(("units", "balance", "width"), sizes, strict=True)), "tokens_per_column": 4.0}
            for name, sizes in groups.items()
        },
        "layers": [{"groups": {name: {} for name in groups}} for _ in range(layers)],
    }
    seal(folder, about)
    return folder


def seal(folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write the document anew, so that it fits the tensors."""
    said = about or json.loads((folder / DOCUMENT).read_text())
    said["tensors_sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / DOCUMENT).write_text(json.dumps(said))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = read_curves(write(tmp_path / "s"))
    assert (found.layers, found.criterion, found.model) == (2, "obs", "0" * 64)
    assert set(found.curves) == {(layer, name) for layer in range(2) for name in UNITS}
    curve = found.curves[1, "ffn"]
    assert curve.removed.tolist() == [0, 4, 8, 12] and curve.loss.tolist() == [0, 8, 16, 24]
    assert curve.at(6) == 12 and curve.at(0) == 0
    assert found.order[0, "heads"].dtype == np.int64 and found.groups["heads"].balance == (2, 2)


def test_the_digest_is_of_both_files(tmp_path: Path) -> None:
    first, second = read_curves(write(tmp_path / "a")), read_curves(write(tmp_path / "b"))
    assert first.digest == second.digest
    about = json.loads((tmp_path / "b" / DOCUMENT).read_text())
    (tmp_path / "b" / DOCUMENT).write_text(json.dumps(about | {"criterion": "wanda"}))
    assert read_curves(tmp_path / "b").digest != first.digest


def change(name: str, value: Callable[[Any], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        tensors[name] = value(tensors[name])
        save_file(tensors, folder / TENSORS)
        seal(folder)

    return act


def drop(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    del tensors["layers.1.ffn.order"]
    save_file(tensors, folder / TENSORS)
    seal(folder)


def said(key: str, value: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        about = json.loads((folder / DOCUMENT).read_text())
        (folder / DOCUMENT).write_text(json.dumps(about | {key: value}))

    return act


def truncate(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-3])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no document": (lambda f: (f / DOCUMENT).unlink(), "no sensitivity.json"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "not readable"),
    "no JSON": (lambda f: (f / DOCUMENT).write_text("{"), "not readable as JSON"),
    "another format": (said("format", 2), "format 2; this version reads format 1"),
    "no criterion": (said("criterion", 3), "not what sensitivity writes"),
    "no damping": (said("damping", None), "not what sensitivity writes"),
    "no tokens a column": (
        said("groups", {name: {"units": 4, "balance": 2, "width": 1} for name in UNITS}),
        "not what sensitivity writes",
    ),
    "no name of the model": (said("model", {"digest": "0" * 64}), "not what sensitivity writes"),
    "no count of tokens": (said("calibration", {"source": "self"}), "not what sensitivity writes"),
    "a share without a number": (
        said("calibration", {"source": {"self": None}, "tokens": 64}),
        "not what sensitivity writes",
    ),
    "no layers": (said("layers", []), "not what sensitivity writes"),
    "a group less in a layer": (said("layers", [{"groups": {"ffn": {}}}]), "not what sensitivity writes"),
    "cut short": (truncate, "damaged"),
    "a tensor less": (drop, "'layers.1.ffn.order' is missing"),
    "a unit less": (change("layers.0.ffn.cost", lambda a: a[1:]), r"\[15\] values of cost"),
    "NaN": (change("layers.0.ffn.curve.loss", lambda a: a * np.nan), "NaN"),
    "negative": (change("layers.0.ffn.curve.loss", lambda a: -a), "negative"),
    "twice": (change("layers.0.heads.order", lambda a: a * 0), "no permutation|not a permutation"),
    "descends": (change("layers.0.heads.curve.removed", lambda a: a[::-1].copy()), "does not ascend"),
    "beyond": (change("layers.0.heads.curve.removed", lambda a: a * 2), "beyond 4 units"),
    "a KV head more": (change("layers.1.kv.loss", lambda a: np.ones(3)), "for each of 2 KV heads"),
    "a shorter curve": (change("layers.0.heads.curve.error", lambda a: a[1:]), "other lengths"),
    "a loss at none": (change("layers.0.heads.curve.loss", lambda a: a + 1), "where nothing is removed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(fault: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    act, told = FAULTS[fault]
    act(folder)
    with pytest.raises(UserError, match=told) as caught:
        read_curves(folder)
    assert str(folder) in caught.value.message and "\n" not in caught.value.message


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_curves(tmp_path / "nothing")
