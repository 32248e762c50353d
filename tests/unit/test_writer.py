"""The Writer leaves a whole checkpoint folder that stock readers take, or nothing."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.checkpoint import writer as writing
from compress.checkpoint.disk import disk_errors
from compress.checkpoint.headers import INDEX, SINGLE, TensorSpec, read_header
from compress.checkpoint.layout import files_bytes
from compress.checkpoint.reader import Reader, spec_of
from compress.checkpoint.writer import Writer
from compress.errors import MachineError, SelfCheckError
from tests import tiny


def some_tensors() -> dict[str, torch.Tensor]:
    """Every width, a scalar, an empty one and odd sizes, in the order in which safetensors lays them out."""
    generator = torch.Generator().manual_seed(0)
    return {
        "long": torch.arange(3),
        "wide.a": torch.randn(3, 5, generator=generator),
        "wide.b": torch.randn(7, generator=generator),
        "half.a": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "half.empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "half.scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "codes": torch.arange(-5, 6, dtype=torch.int8),
    }


def specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [spec_of(name, value) for name, value in tensors.items()]


def write(target: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> Path:
    with Writer(target, specs(tensors), shard_bytes) as writer:
        writer.text("config.json", "{}")
        for name, value in reversed(tensors.items()):  # any order will do
            writer.put(name, value)
    return target


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_stock_reads_what_was_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    loaded = load_file(write(tmp_path / "out", tensors) / SINGLE)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name


def test_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "stock.safetensors", metadata={"format": "pt"})
    assert (write(tmp_path / "out", tensors) / SINGLE).read_bytes() == (tmp_path / "stock.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_numbers_are_read_and_copied(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(12).reshape(4, 3).to(dtype)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    save_file({"a": value}, tmp_path / "source" / SINGLE)
    with Reader(tmp_path / "source") as reader, Writer(tmp_path / "out", reader.header.tensors.values()) as writer:
        assert torch.equal(reader.tensor("a"), value)
        assert torch.equal(reader.rows("a", [0, 1, 3]), torch.stack([value[0], value[1], value[3]]))
        assert spec_of("a", value) == reader.spec("a")
        writer.copy(reader, "a")
    copied = load_file(tmp_path / "out" / SINGLE)["a"]
    assert copied.dtype == dtype
    assert torch.equal(copied, value)


def test_non_contiguous_and_trained_tensors(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).requires_grad_()
    out = write(tmp_path / "out", {"a": value.T, "b": value[:, 1]})
    loaded = load_file(out / SINGLE)
    assert torch.equal(loaded["a"], value.T.detach())
    assert torch.equal(loaded["b"], value[:, 1].detach())


@pytest.mark.parametrize("shard_bytes", [1, 100, 150, 10**9])
def test_planned_bytes_are_written_bytes(tmp_path: Path, shard_bytes: int) -> None:
    tensors = some_tensors()
    out = write(tmp_path / "out", tensors, shard_bytes)
    files = sorted(out.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) == files_bytes(specs(tensors), shard_bytes)
    assert (len(files) == 1) == (shard_bytes == 10**9)
    assert read_header(out).tensors.keys() == tensors.keys()


def test_shards_and_index_load_through_stock(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    with Reader(source) as reader, Writer(tmp_path / "out", reader.header.tensors.values(), 60_000) as writer:
        writer.config(dict(reader.header.config), source)
        writer.carry(source)
        for name in reader.header.tensors:
            writer.copy(reader, name)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in reader.header.tensors.values())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours, stock = model.state_dict(), AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_copying_everything_gives_the_same_file(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", dtype=torch.bfloat16)
    with Reader(source) as reader, Writer(tmp_path / "out", reader.header.tensors.values()) as writer:
        for name in reader.header.tensors:
            writer.copy(reader, name)
    assert (tmp_path / "out" / SINGLE).read_bytes() == (source / SINGLE).read_bytes()


def test_rows_in_blocks_give_the_same_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    with Writer(tmp_path / "out", specs(tensors)) as writer:
        writer.text("config.json", "{}")
        for name, value in tensors.items():
            if name in ("wide.a", "half.a", "codes"):
                for start in range(0, len(value), 2):
                    writer.put_rows(name, start, value[start : start + 2])
            else:
                writer.put(name, value)
    assert (tmp_path / "out" / SINGLE).read_bytes() == (write(tmp_path / "whole", tensors) / SINGLE).read_bytes()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([(0, 2), (3, 5)], "out of turn"),  # a gap
        ([(0, 2), (1, 3)], "out of turn"),  # an overlap
        ([(0, 2), (2, 6)], "out of turn"),  # beyond the end
        ([(2, 5)], "out of turn"),
        ([(0, 2)], "1 planned tensors were not written, first 'a'"),
    ],
)
def test_rows_that_leave_a_gap_are_refused(tmp_path: Path, blocks: list[tuple[int, int]], words: str) -> None:
    with (
        pytest.raises(SelfCheckError, match=words),
        Writer(tmp_path / "out", specs({"a": torch.zeros(5, 3)})) as writer,
    ):
        for start, stop in blocks:
            writer.put_rows("a", start, torch.zeros(stop - start, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float16), torch.tensor(1.0)])
def test_rows_of_another_width_or_dtype_are_refused(tmp_path: Path, value: torch.Tensor) -> None:
    refused = pytest.raises(SelfCheckError, match="planned rows of")
    with refused, Writer(tmp_path / "out", specs({"a": torch.zeros(5, 3)})) as writer:
        writer.put_rows("a", 0, value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_stands_before_the_end(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", specs({"a": torch.zeros(2)})) as writer:
        writer.put("a", torch.zeros(2))
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Writer(tmp_path / "out", specs({"a": torch.zeros(2)})) as writer:
        writer.put("a", torch.zeros(2))
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old.safetensors").write_text("old")
    write(tmp_path / "out", {"a": torch.zeros(2)})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", SINGLE]


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}
    refused = pytest.raises(SelfCheckError, match="1 planned tensors were not written, first 'b'")
    with refused, Writer(tmp_path / "out", specs(tensors)) as writer:
        writer.put("a", tensors["a"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("c", torch.zeros(2), "not planned: 'c'"),
        ("a", torch.zeros(3), "planned TensorSpec"),
        ("a", torch.zeros(2, dtype=torch.bfloat16), "planned TensorSpec"),
        ("a", torch.zeros(1, 2), "planned TensorSpec"),
    ],
)
def test_an_unplanned_tensor_is_refused(tmp_path: Path, name: str, value: torch.Tensor, words: str) -> None:
    with pytest.raises(SelfCheckError, match=words), Writer(tmp_path / "out", specs({"a": torch.zeros(2)})) as writer:
        writer.put(name, value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_are_what_the_umask_says(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    source = tiny.llama(tmp_path / "source")
    (source / "tokenizer.json").chmod(0o600)
    with umask(mask), Writer(tmp_path / "out", specs(some_tensors()), shard_bytes=100) as writer:
        writer.text("config.json", "{}")
        writer.carry(source)
        for name, value in some_tensors().items():
            writer.put(name, value)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {
        p.name: file_mode for p in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Full at the header (0), at the first tensor (1), in the middle of the second (2)."""
    real, done = os.pwrite, 0

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal done
        if done == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done += 1
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MachineError, match="the disk is full") as caught:
        write(tmp_path / "out", {"a": torch.zeros(2), "b": torch.zeros(2)})
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:5], offset))
    tensors = some_tensors()
    loaded = load_file(write(tmp_path / "out", tensors) / SINGLE)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_open_files_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path / "out", some_tensors(), shard_bytes=1)
    with pytest.raises(ValueError, match="stop"), Writer(tmp_path / "two", specs(some_tensors()), shard_bytes=1):
        raise ValueError("stop")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk slower than the work; tensors larger than the bound are written at once."""
    monkeypatch.setattr(writing, "BEHIND", 100)
    real, waiting = os.pwrite, []

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(0.002)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    tensors = {f"t{index}": torch.full((size,), index / 7) for index, size in enumerate([10, 20, 30, 3, 25, 26, 1] * 3)}
    with Writer(tmp_path / "out", specs(tensors)) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
            waiting.append(writer._behind._bytes)
        writer.sync()
        assert writer._behind._bytes == 0
    assert 0 < max(waiting) <= 100
    loaded = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_a_disk_that_is_full_when_bytes_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that flushes is told of it, the next call raises it."""
    monkeypatch.setattr(writing, "FLUSH", 1)
    real = os.fsync

    def full(descriptor: int) -> None:
        if threading.current_thread().name == "flushing":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="the disk is full"), Writer(tmp_path / "out", specs(some_tensors())) as one:
        for _ in range(1000):  # until the thread has been heard
            for name, value in some_tensors().items():
                one.put(name, value)
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_cannot_start_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tensors = some_tensors()
    monkeypatch.setattr(threading.Thread, "start", refused)
    with (
        pytest.raises(RuntimeError, match="can't start new thread"),
        Writer(tmp_path / "out", [spec_of(name, value) for name, value in tensors.items()]) as writer,
    ):
        for name, value in tensors.items():
            writer.put(name, value)


@pytest.mark.parametrize("message", ["No space left on device (os error 28)", "something else"])
def test_what_a_library_makes_of_a_disk_that_refuses_is_one_line_too(message: str, tmp_path: Path) -> None:
    from safetensors import SafetensorError

    errors = (SafetensorError(message), RuntimeError(f"[enforce fail at inline_container.cc:672] {message}"))
    for error in errors:
        with pytest.raises(MachineError, match="full" if "28" in message else message), disk_errors(tmp_path / "x"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes do not match")
