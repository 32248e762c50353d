"""Broken safetensors headers and indexes of a real checkpoint, through the command line: one line, exit code 2.

And checkpoints whose headers are in order, but which stock transformers would not load or run: a plan, which looks at
the decoder alone, lets them pass.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.headers import INDEX
from tests import tiny
from tests.faults.test_bad_input import Breaker, drop, edit_config, edit_weights, refused

SHARD = "model-00002-of-00006.safetensors"
FIRST = "model-00001-of-00006.safetensors"


def edit(change: Callable[[dict[str, Any]], None]) -> Breaker:
    """Change the parsed header of one shard; its data stays."""

    def apply(model: Path) -> None:
        raw = (model / SHARD).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (model / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return apply


def tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    """In the order of their bytes."""
    found = [value for name, value in header.items() if name != "__metadata__"]
    return sorted(found, key=lambda value: int(value["data_offsets"][0]))


def move(by: int) -> Breaker:
    def change(header: dict[str, Any]) -> None:
        last = tensors(header)[-1]
        last["data_offsets"] = [offset + by for offset in last["data_offsets"]]

    return edit(change)


def put(key: str, value: Any) -> Breaker:
    return edit(lambda header: tensors(header)[0].update({key: value}))


def text_of_header(text: bytes) -> Breaker:
    def apply(model: Path) -> None:
        raw = (model / SHARD).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        (model / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return apply


def length_of_header(length: int) -> Breaker:
    def apply(model: Path) -> None:
        (model / SHARD).write_bytes(struct.pack("<Q", length) + (model / SHARD).read_bytes()[8:])

    return apply


def index(change: Callable[[dict[str, Any]], None]) -> Breaker:
    def apply(model: Path) -> None:
        said = json.loads((model / INDEX).read_text())
        change(said)
        (model / INDEX).write_text(json.dumps(said))

    return apply


def point(file: str) -> Breaker:
    """The index names another file for the first tensor."""
    return index(lambda said: said["weight_map"].update({next(iter(said["weight_map"])): file}))


def replaced(file: str, content: bytes) -> Breaker:
    return lambda model: void((model / file).write_bytes(content))


def void(_: object) -> None:
    """For what returns a number where nothing is wanted."""


FAULTS: dict[str, tuple[Breaker, list[str]]] = {
    "overlap": (move(-4), [SHARD, "overlaps tensor"]),
    "hole": (move(4), [SHARD, "4 bytes between", "belong to nothing"]),
    "out of range": (move(2**40), [SHARD, "belong to nothing"]),
    "shape and bytes": (put("shape", [1, 2, 3]), [SHARD, "of shape [1, 2, 3] needs"]),
    "dtype": (put("dtype", "F33"), [SHARD, "unknown dtype 'F33'"]),
    "another dtype": (put("dtype", "F16"), [SHARD, "needs"]),
    "negative size": (put("shape", [-64, -96]), [SHARD, "whole numbers"]),
    "negative offsets": (put("data_offsets", [-8, 0]), [SHARD, "whole numbers"]),
    "absurd shape": (put("shape", [2**40, 2**40, 0]), [SHARD, "absurd shape"]),
    "no UTF-8": (text_of_header(b'{"\xff": 1}'), [SHARD, "broken safetensors header", "0xff"]),
    "deep": (text_of_header(b'{"a":' * 100_000), [SHARD, "broken safetensors header", "recursion"]),
    "no object": (text_of_header(b"[]"), [SHARD, "broken safetensors header"]),
    "empty": (text_of_header(b"{}"), [SHARD, "trailing bytes"]),
    "length of nothing": (length_of_header(0), [SHARD, "broken safetensors header"]),
    "absurd length": (length_of_header(2**63), [SHARD, "truncated or not safetensors"]),
    "length beyond 100 MB": (length_of_header(100_000_001), [SHARD, "truncated or not safetensors"]),
    "twice": (lambda model: void((model / SHARD).write_bytes((model / FIRST).read_bytes())), ["stands in", FIRST]),
    "index: missing file": (point("model-00009-of-00006.safetensors"), ["model-00009", "missing shard"]),
    "index: foreign file": (point("config.json"), ["config.json", "truncated or not safetensors"]),
    "index: other shard": (point(FIRST.replace("1-of", "5-of")), [INDEX, "which does not hold it"]),
    "index: unknown tensor": (
        index(lambda said: said["weight_map"].update({"x\ny": FIRST})),
        [INDEX, "'x\\ny'", "which does not hold it"],
    ),
    "index: two lines": (point("a\nb"), [INDEX, "'a\\nb'"]),
    "index: no metadata": (index(lambda said: void(said.pop("metadata"))), [INDEX, "'metadata'"]),
    "index: deep": (replaced(INDEX, b'{"a":' * 100_000), [INDEX, "not readable as JSON"]),
    "index: no UTF-8": (replaced(INDEX, b"\xff\xfe"), [INDEX, "not readable as JSON"]),
    "config: deep": (replaced("config.json", b"[" * 100_000), ["config.json", "not readable as JSON"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.llama(tmp_path_factory.mktemp("whole") / "model", shard="100KB")
    assert {SHARD, FIRST, INDEX} <= {path.name for path in model.iterdir()}
    return model


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_headers_are_refused(
    fault: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "results" / "out"
    shutil.copytree(whole, model)
    out.parent.mkdir()
    breaker, says = FAULTS[fault]
    breaker(model)
    refused(capsys, ["quantize", str(model), "-o", str(out), "--format", "bf16", "-q"], out, says)


PROJ = "model.visual.merger.proj.weight"
BEYOND: dict[str, tuple[Breaker, list[str]]] = {
    "vision of other sizes": (
        edit_config(lambda said: said["vision_config"].update(image_size=70)),
        ["stock transformers", "mismatched_keys", "position_embedding"],
    ),
    "vision tensor missing": (drop(PROJ), ["stock transformers", "missing", PROJ]),
    "a tensor too many": (edit_weights(lambda stored: stored.update(extra=torch.zeros(2))), ["unexpected", "extra"]),
    "rope that does not add up": (
        edit_config(lambda said: said["text_config"]["rope_parameters"].update(mrope_section=[1, 9, 0])),
        ["config.json", "cannot run it", "[1, 9, 0]"],
    ),
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.glm4v(tmp_path_factory.mktemp("vision") / "model")


@pytest.mark.parametrize("fault", BEYOND)
def test_what_stock_transformers_would_not_take_is_refused_before_the_work(
    fault: str, vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "broken", tmp_path / "results" / "out"
    shutil.copytree(vision, broken)
    out.parent.mkdir()
    breaker, says = BEYOND[fault]
    breaker(broken)
    text = ["--samples", "4", "--length", "32", "-q"]
    refused(capsys, ["prune", str(broken), "-o", str(out), "--ffn", "0.25", *text], out, says)
    refused(capsys, ["distill", str(vision), "--teacher", str(broken), "-o", str(out), *text], out, says)
