"""Packer: it writes, holds and counts the same from memory or disk, whole or in blocks, at once or resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.arch import FAMILIES, family_of
from compress.checkpoint.headers import Header, TensorSpec, read_header
from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.errors import UserError
from compress.formats import FORMATS, decoder_linears, format, open_stream
from compress.formats.packing import Packer
from compress.machine import peak_memory, reset_peak_memory, resident_memory
from compress.steps.quantize.plan import SPARE, units
from compress.stream.forward import Stream
from tests import tiny
from tests.unit.test_quantize import quantize

torch.set_num_threads(1)
IDS = torch.randint(0, 190, (2, 24), generator=torch.Generator().manual_seed(3))


@contextmanager
def packing(source: Path, target: Path, how: str) -> Iterator[tuple[Reader, Packer, Header]]:
    """A packer that writes `source` into `target`."""
    with Reader(source) as reader:
        linears = decoder_linears(reader.header, family_of(reader.header))
        after = FORMATS[how].plan(reader.header, linears)
        with Writer(target, after.tensors.values()) as writer:
            writer.config(after.config, source)
            yield reader, Packer(writer, FORMATS[how], linears), after


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("how", FORMATS)
def test_put_and_take_and_any_block_write_the_same(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.glm4v(tmp_path / "source", dtype=torch.float32)
    with packing(source, tmp_path / "taken", how) as (reader, packer, _):
        for name in reader.header.tensors:
            packer.take(reader, name, hold=False)
        taken = packer.receipt()
    monkeypatch.setattr(format, "BLOCK_BYTES", 7 * 64 * 4)
    with packing(source, tmp_path / "put", how) as (reader, packer, _):
        for name in reversed(list(reader.header.tensors)):
            packer.put(name, reader.tensor(name))
        put = packer.receipt()
    assert same(tmp_path / "taken", tmp_path / "put")
    assert put["rounding"].keys() == taken["rounding"].keys() and len(taken["rounding"]) == 6
    for kind, summary in taken.pop("rounding").items():
        assert put["rounding"][kind] == pytest.approx(summary, rel=1e-5)
    put.pop("rounding")
    assert put == taken


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_held_computes_what_the_folder_computes(family: str, how: str, tmp_path: Path) -> None:
    """Also for the family that stock transformers does not load."""
    source = getattr(tiny, family)(tmp_path / "source", dtype=torch.float32)
    with packing(source, tmp_path / "out", how) as (reader, packer, after):
        stream = open_stream(packer.written(reader, after), torch.float32)
        hidden = stream.embed(IDS)
        *layers, rest = units(reader.header, FAMILIES[family])
        for index, names in enumerate(layers):
            for name in names:
                packer.take(reader, name)
            with stream.layer(index) as layer:
                stream.advance(layer, hidden)
            packer.release()
        for name in rest:
            packer.take(reader, name, hold=False)
        logits = stream.head_logits(stream.norm(hidden))
    with Reader(tmp_path / "out") as written:
        assert torch.equal(open_stream(written, torch.float32).logits(IDS), logits)
    with Reader(source) as plain:
        unrounded = Stream(plain, FAMILIES[family], dtype=torch.float32).logits(IDS)
    assert not torch.equal(unrounded, logits)


def test_only_what_is_held_can_be_computed_with(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    with packing(source, tmp_path / "out", "w8a16") as (reader, packer, after):
        written = packer.written(reader, after)
        for name in reader.header.tensors:
            packer.take(reader, name, hold=name.startswith("model.layers.0."))
        stream = open_stream(written, torch.float32)
        with stream.layer(0):
            pass
        with pytest.raises(UserError, match=r"layers\.1\..*weight_packed' is missing"), stream.layer(1):
            pass
        packer.release()
        with pytest.raises(UserError, match=r"layers\.0\..*weight_packed' is missing"), stream.layer(0):
            pass


@pytest.mark.parametrize("how", ["w8a8", "fp16"])
def test_counts_go_on_from_a_state(how: str, tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", dtype=torch.float32)
    with packing(source, tmp_path / "whole", how) as (reader, packer, _):
        names = list(reader.header.tensors)
        for name in names:
            packer.take(reader, name, hold=False)
        whole = packer.receipt()
    with (
        Reader(source) as reader,
        Writer(tmp_path / "again", read_header(tmp_path / "whole").tensors.values()) as writer,
    ):
        linears = decoder_linears(reader.header, family_of(reader.header))
        one, other = (Packer(writer, FORMATS[how], linears) for _ in range(2))
        for name in names[: len(names) // 2]:
            one.take(reader, name, hold=False)
        state = one.state()
        other.restore(json.loads(json.dumps(state)))
        for name in names[len(names) // 2 :]:
            other.take(reader, name, hold=False)
    assert one.state() == state and one.receipt() != whole
    assert other.receipt() == whole
    assert same(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("how", FORMATS)
def test_a_value_without_rows_and_an_empty_one_are_written(how: str, tmp_path: Path) -> None:
    specs = [TensorSpec("scalar", "F32", ()), TensorSpec("none", "F32", (0, 3)), TensorSpec("ids", "I64", (2,))]
    after = [FORMATS[how].kept(spec) for spec in specs]
    with Writer(tmp_path / "out", after) as writer:
        packer = Packer(writer, FORMATS[how], ())
        packer.put("scalar", torch.tensor(1.5))
        packer.put("none", torch.empty(0, 3))
        packer.put("ids", torch.tensor([2**40, -1]))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert float(found["scalar"]) == 1.5 and found["none"].shape == (0, 3) and found["ids"].tolist() == [2**40, -1]


# what the step that uses it costs


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_quantize_reads_every_byte_once(how: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the embeddings of the probe's tokens; a tied embedding is read for the output matrix as it is written."""
    source = tiny.llama(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=tied)
    read: dict[str, int] = {}
    real = Reader._read

    def counted(self: Reader, spec: TensorSpec, start: int, nbytes: int) -> torch.Tensor:
        read[spec.name] = read.get(spec.name, 0) + nbytes
        return real(self, spec, start, nbytes)

    monkeypatch.setattr(Reader, "_read", counted)
    quantize(source, tmp_path / "out", how)
    header = read_header(source)
    rows = read.pop("model.embed_tokens.weight") - header.tensors["model.embed_tokens.weight"].nbytes
    assert 0 < rows <= 64 * 64 * 2  # the probe: 2 x 32 tokens of 64 values
    norm = read.pop("model.norm.weight")  # for the probe as well
    assert norm <= 2 * 64 * 2
    assert read == {name: spec.nbytes for name, spec in header.tensors.items() if name in read}
    assert read.keys() == header.tensors.keys() - {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize("how", FORMATS)
def test_the_planned_memory_is_an_honest_bound(how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One wide layer of 39 M parameters, far above what the plan adds for libraries."""
    source = tmp_path_factory.getbasetemp() / "wide"
    if not source.exists():
        sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
        tiny.llama(source, dtype=torch.bfloat16, num_hidden_layers=1, intermediate_size=4608, **sizes)
    quantize(tiny.llama(tmp_path_factory.mktemp("small") / "warm"), tmp_path_factory.mktemp("out") / "warm", how)
    before = resident_memory()
    reset_peak_memory()
    job, _ = quantize(source, tmp_path_factory.mktemp("out") / "wide", how)
    grown = peak_memory() - before
    assert grown <= job.plan.memory <= SPARE + 1.5 * max(grown, 40 * 2**20)
