"""The streamed backward pass against autograd on the whole stock model, in every family: the statistics are those that
backward.py defines; batches, blocks of the vocabulary and a tape on disk change nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.arch import FAMILIES, Group, family_of
from compress.arch.rope import arranged
from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import Reader
from compress.errors import MachineError
from compress.stream import GRADIENTS, backward, tape
from compress.stream.arranged import stock_view
from compress.stream.backward import Found, gradients
from compress.stream.forward import Stream
from tests import brute, tiny

STOCK = [name for name in FAMILIES if name != "glm4v_native"]  # which stock transformers does not load


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backward")


def model(models: Path, family: str) -> Path:
    folder = models / family
    return folder if folder.exists() else getattr(tiny, family)(folder)


def windows(count: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(0))


def groups_of(folder: Path) -> list[tuple[Group, ...]]:
    header = read_header(folder)
    family = family_of(header)
    sizes = family.sizes(header)
    return [family.groups(sizes, header.text_config)] * sizes.layers


@contextmanager
def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[Stream]:
    with Reader(folder) as reader:
        yield Stream(reader, family_of(reader.header), dtype=dtype)


def found(folder: Path, ids: torch.Tensor, **more: Any) -> Found:
    with streamed(folder) as stream:
        return gradients(stream, ids, groups_of(folder), GRADIENTS, **more)


def same(got: Found, expected: Found, rtol: float = 1e-4) -> None:
    assert [list(layer) for layer in got] == [list(layer) for layer in expected]
    for index, layer in enumerate(expected):
        for group, kinds in layer.items():
            assert got[index][group].keys() == kinds.keys()
            for kind, value in kinds.items():
                seen = got[index][group][kind]
                assert seen.dtype == torch.float32 and bool((seen > 0).all())
                floor = rtol * float(value.mean())  # of a unit whose gradients nearly cancel, rounding is left
                what = f"layer {index} {group} {kind}: "
                torch.testing.assert_close(seen, value, rtol=rtol, atol=floor, msg=lambda said, what=what: what + said)


@pytest.mark.parametrize("family", STOCK)
def test_it_is_autograd_on_the_whole_model(family: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "BATCH_TOKENS", 48)  # two windows a batch, the last one alone
    monkeypatch.setattr(backward, "vocab_rows", lambda hidden: 100)  # 384 rows in four blocks
    folder, matrices = model(models, family), dict[tuple[int, str], torch.Tensor]()
    got = found(folder, windows(), full=lambda layer, group, matrix: matrices.update({(layer, group): matrix}))
    expected, full = brute.gradients(folder, windows())
    same(got, expected)
    assert matrices.keys() == full.keys()
    for key, matrix in full.items():
        torch.testing.assert_close(matrices[key], matrix, rtol=1e-3, atol=1e-5 * float(matrix.diagonal().max()))


def test_rows_in_another_order_give_the_same(models: Path) -> None:
    """glm4v_native runs in stock classes that take the rotary rows of a head in another order: the units are those of
    the same model written in that order."""
    folder, ids = model(models, "glm4v_native"), windows()
    got, twin = found(folder, ids), models / "twin"
    header = read_header(folder)
    family = family_of(header)
    config, orders = stock_view(family, header.config)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.startswith(f"{family.text}.layers."):
            inside = name.removeprefix(f"{family.text}.layers.").split(".", 1)[1]
            tensors[name] = arranged(inside, value, orders).contiguous()
    shutil.copytree(folder, twin)
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    (twin / "config.json").write_text(json.dumps(config))
    assert orders
    same(got, brute.gradients(twin, ids)[0])


def test_a_tape_on_disk_changes_no_byte(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(models, "llama")
    monkeypatch.setattr(backward, "BATCH_TOKENS", 48)
    with streamed(folder) as stream:
        expected = gradients(stream, windows(), groups_of(folder), GRADIENTS, scratch=tmp_path)
        monkeypatch.setattr(tape, "TAPE_BYTES", 3 * 5 * 24 * 64 * 4 - 1)  # just too small
        written: list[int] = []
        real = os.pwrite

        def pwrite(descriptor: int, content: memoryview, offset: int) -> int:
            written.append(real(descriptor, content[: len(content) // 2 + 1], offset))  # a write may be a short one
            return written[-1]

        monkeypatch.setattr(os, "pwrite", pwrite)
        got = gradients(stream, windows(), groups_of(folder), GRADIENTS, scratch=tmp_path)
    assert sum(written) == 3 * 5 * 24 * 64 * 4  # layers, windows, tokens, hidden
    for index, layer in enumerate(expected):
        for group, kinds in layer.items():
            assert all(torch.equal(got[index][group][kind], value) for kind, value in kinds.items())
    assert not list(tmp_path.iterdir())  # an unnamed file


def test_a_full_disk_is_one_line(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tape, "TAPE_BYTES", 0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MachineError, match="the disk is full"):
        found(model(models, "llama"), windows(), scratch=tmp_path)


def test_only_what_is_wanted_is_gathered(models: Path) -> None:
    folder = model(models, "qwen2")
    every = found(folder, windows())
    for kind in sorted(GRADIENTS):
        with streamed(folder) as stream:
            alone = gradients(stream, windows(), groups_of(folder), {kind})
        for got, expected in zip(alone, every, strict=True):
            for group, kinds in expected.items():
                assert got[group].keys() == {kind} and torch.equal(got[group][kind], kinds[kind])


def test_every_layer_has_its_own_groups(models: Path) -> None:
    folder = model(models, "llama")
    heads, ffn = groups_of(folder)[0]
    every = found(folder, windows())
    with streamed(folder) as stream:
        some = gradients(stream, windows(), [[ffn], [], [heads]], GRADIENTS)
    assert [list(layer) for layer in some] == [["ffn"], [], ["heads"]]
    for got, expected in ((some[0]["ffn"], every[0]["ffn"]), (some[2]["heads"], every[2]["heads"])):
        assert all(torch.equal(got[kind], expected[kind]) for kind in GRADIENTS)


def test_it_runs_in_float32_whatever_the_stream_runs_in(models: Path) -> None:
    folder = model(models, "glm4v_native")
    exact = found(folder, windows())
    with streamed(folder, torch.bfloat16) as stream:
        same(gradients(stream, windows(), groups_of(folder), GRADIENTS), exact, rtol=0)


def test_a_window_of_one_token_predicts_nothing(models: Path) -> None:
    with pytest.raises(ValueError, match="none is predicted"):
        found(model(models, "llama"), windows(3, 1))
