"""read_header refuses every folder that a later step could not read, with one line that names the file."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from compress.arch import family_of
from compress.checkpoint.headers import INDEX, SINGLE, Header, read_header, read_shard_header
from compress.errors import UserError


def safetensors(entries: dict[str, Any] | bytes, data: bytes) -> bytes:
    head = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + data


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def single(folder: Path, entries: dict[str, Any] | bytes, nbytes: int) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / SINGLE).write_bytes(safetensors(entries, bytes(nbytes)))
    return folder


def sharded(folder: Path, weight_map: Any = None) -> Path:
    """Two shards, `a` and `b` of two floats each."""
    (folder / "config.json").write_text("{}")
    (folder / "one.safetensors").write_bytes(safetensors({"a": entry(0, 8)}, bytes(8)))
    (folder / "two.safetensors").write_bytes(safetensors({"b": entry(0, 8)}, bytes(8)))
    both = {"a": "one.safetensors", "b": "two.safetensors"}
    index = {"metadata": {}, "weight_map": both if weight_map is None else weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def complaint(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_header(folder)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_whole_folder_is_read(tmp_path: Path) -> None:
    header = read_header(sharded(tmp_path))
    assert {name: (t.shape, t.nbytes) for name, t in header.tensors.items()} == {"a": ((2,), 8), "b": ((2,), 8)}
    where = header.locations["b"]
    assert where.file.name == "two.safetensors"
    assert where.offset == where.file.stat().st_size - 8
    assert header.nbytes == 16


def test_empty_and_scalar_tensors_are_fine(tmp_path: Path) -> None:
    header = read_header(single(tmp_path, {"none": entry(0, 0, [0, 7]), "scalar": entry(0, 4, [])}, 4))
    assert header.tensors["none"].nbytes == 0
    assert header.tensors["scalar"].shape == ()


def test_no_folder(tmp_path: Path) -> None:
    assert complaint(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such folder"


def test_no_config(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"{tmp_path / 'config.json'}: not found"


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\xff\xfe", "[" * 100_000])
def test_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in complaint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert complaint(tmp_path) == f"{tmp_path}: no {SINGLE} and no {INDEX}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_only_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    assert f"only pickled weights ({name})" in complaint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    assert complaint(tmp_path) == f"{tmp_path / 'two.safetensors'}: missing shard"


@pytest.mark.parametrize("left", [0, 5, 8, 40, -1])
def test_truncated_shard(tmp_path: Path, left: int) -> None:
    shard = sharded(tmp_path) / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    assert complaint(tmp_path).startswith(f"{shard}: truncated")


def test_trailing_bytes(tmp_path: Path) -> None:
    shard = sharded(tmp_path) / "one.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert complaint(tmp_path).startswith(f"{shard}: trailing bytes")


@pytest.mark.parametrize(
    "name", ["../two.safetensors", "/etc/passwd", "..", ".", "", "sub/two.safetensors", "t\0wo", "two\n", "./two"]
)
def test_index_naming_a_path_outside(tmp_path: Path, name: str) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": name})
    assert f"{name!r}, which is outside the folder" in complaint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "pytorch_model.bin"])
def test_index_naming_a_file_of_another_kind(tmp_path: Path, name: str) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": name})
    (tmp_path / name).write_text('{"version": "1.0", "truncation": null}')
    assert complaint(tmp_path).startswith(f"{tmp_path / name}: truncated or not safetensors")


@pytest.mark.parametrize("weight_map", [{}, [], "x", {"a": 1}, {"a": None}])
def test_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    assert "'weight_map'" in complaint(sharded(tmp_path, weight_map))


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_index_without_metadata(tmp_path: Path, metadata: Any) -> None:
    """Stock transformers reads the key and would end with a KeyError."""
    index = sharded(tmp_path) / INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": metadata}))
    assert "'metadata' is missing or not a map" in complaint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000, '{"weight_map": ' + "9" * 5000 + "}"])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path) / INDEX).write_bytes(text.encode("latin-1"))
    assert complaint(tmp_path).startswith(str(tmp_path / INDEX))


def test_index_that_contradicts_the_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    assert "which does not hold it" in complaint(tmp_path)


def test_index_with_a_tensor_no_shard_holds(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    assert complaint(tmp_path).endswith("says that 'c' is in two.safetensors, which does not hold it")


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As stock transformers does; what the index says then is of no account, however wrong."""
    single(sharded(tmp_path), {"c": entry(0, 12)}, 12)
    assert {name: where.file.name for name, where in read_header(tmp_path).locations.items()} == {"c": SINGLE}
    sharded(tmp_path, {"a": "../one.safetensors"})
    assert set(read_header(tmp_path).tensors) == {"c"}


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(safetensors({"a": entry(0, 8)}, bytes(8)))
    assert complaint(tmp_path) == f"{tmp_path / 'two.safetensors'}: tensor 'a' stands in one.safetensors as well"


@pytest.mark.parametrize(
    ("entries", "nbytes", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor 'b' overlaps tensor 'a'"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "tensor 'b' overlaps tensor 'a'"),  # two names for the same bytes
        ({"a": entry(0, 16), "b": entry(4, 8)}, 16, "tensor 'b' overlaps tensor 'a'"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "4 bytes between tensor 'a' and tensor 'b' belong to nothing"),
        ({"a": entry(4, 12)}, 12, "4 bytes between the header and tensor 'a' belong to nothing"),
        ({"a": entry(0, 8), "b": entry(2**62, 2**62 + 8)}, 16, "between tensor 'a' and tensor 'b' belong to nothing"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, "truncated"),
        ({}, 8, "trailing bytes"),
        ({"a": entry(0, 8), "z": entry(4, 4, [0])}, 8, "tensor 'z' overlaps tensor 'a'"),
    ],
)
def test_overlaps_and_gaps(tmp_path: Path, entries: dict[str, Any], nbytes: int, words: str) -> None:
    assert words in complaint(single(tmp_path, entries, nbytes))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (entry(0, 8, [-2]), "whole numbers"),
        (entry(0, 8, [-1, -2]), "whole numbers"),
        ({**entry(0, 8), "data_offsets": [-8, 0]}, "whole numbers"),
        (entry(0, 8, [2.0]), "whole numbers"),  # type: ignore[list-item]
        (entry(0, 8, [True, 2]), "whole numbers"),
        (entry(0, 8, ["2"]), "whole numbers"),  # type: ignore[list-item]
        (entry(0, 8, [10**30]), "whole numbers"),
        (entry(0, 8, [2**40, 2**40, 0]), "absurd shape"),
        (entry(0, 8, [3]), "needs 12 bytes, has 8"),
        ({**entry(0, 8), "data_offsets": [8, 0]}, "has -8"),
        (entry(0, 8, [2], "Q3"), "unknown dtype 'Q3'"),
        (entry(0, 8, [2], "f32"), "unknown dtype 'f32'"),
        ({**entry(0, 8), "dtype": ["F32"]}, "unknown dtype ['F32']"),
        ({**entry(0, 8), "data_offsets": [0]}, "list of sizes and two offsets"),
        ({**entry(0, 8), "data_offsets": [0, 8, 8]}, "list of sizes and two offsets"),
        ({**entry(0, 8), "data_offsets": "08"}, "list of sizes and two offsets"),
        ({**entry(0, 8), "shape": 2}, "list of sizes and two offsets"),
        ({**entry(0, 4), "shape": ""}, "list of sizes and two offsets"),
        ({**entry(0, 4), "shape": {}}, "list of sizes and two offsets"),
        ({"dtype": "F32", "shape": [2]}, "must have dtype, shape and data_offsets, and nothing else"),
        ({**entry(0, 8), "stride": 1}, "must have dtype, shape and data_offsets, and nothing else"),
        ([], "must have dtype"),
        (None, "must have dtype"),
        ("F32", "must have dtype"),
    ],
)
def test_wrong_entries(tmp_path: Path, value: Any, words: str) -> None:
    assert words in complaint(single(tmp_path, {"a": value}, 8))


@pytest.mark.parametrize("name", ["a\nb", "a\0", "\x1b[31m"])
def test_names_of_two_lines(tmp_path: Path, name: str) -> None:
    assert f"tensor {name!r} has a name that cannot be printed" in complaint(single(tmp_path, {name: entry(0, 8)}, 8))


GOOD = json.dumps(entry(0, 8)).encode()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "Expecting value"),
        (b"garbage!", "Expecting value"),
        (b"[1, 2]", "not a JSON object"),
        (b"\xff\xff", "can't decode byte 0xff"),
        (b'{"a": ' + GOOD + b"}\0", "Extra data"),
        (json.dumps({"a": entry(0, 8)}).encode("utf-16"), "can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"a": ' + GOOD + b', "a": ' + GOOD + b"}", "'a' stands in it twice"),
        (GOOD.replace(b"{", b'{"a": {"dtype": "F32", ') + b"}", "'dtype' stands in it twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"\\ud800": ' + GOOD + b"}", "surrogates not allowed"),
        (b'{"__metadata__": {"\\udfff": "x"}}', "surrogates not allowed"),
        (b'{"__metadata__": {"x": 1}}', "__metadata__ is no map"),
        (b'{"__metadata__": [1]}', "__metadata__ is no map"),
        (b'{"__metadata__": "x"}', "__metadata__ is no map"),
    ],
)
def test_garbage_header(tmp_path: Path, head: bytes, words: str) -> None:
    found = complaint(single(tmp_path, head, 8))
    assert "broken safetensors header" in found and words in found


def test_minus_nothing_is_no_size(tmp_path: Path) -> None:
    assert "whole numbers" in complaint(single(tmp_path, b'{"a": ' + GOOD.replace(b"[0, 8]", b"[-0, 8]") + b"}", 8))


def test_what_is_read_the_safetensors_library_reads_the_same(tmp_path: Path) -> None:
    """Bytes of a header flipped, dropped and doubled: whatever passes, passes there too, with equal tensors."""
    dice = random.Random(0)
    whole = single(tmp_path, {"__metadata__": {"k": "v"}, "a.b": entry(0, 8), "c": entry(8, 20, [1, 3])}, 0)
    file = whole / SINGLE
    raw, passed = file.read_bytes()[8:], 0
    for _ in range(1000):
        head = bytearray(raw)
        for _ in range(dice.choice([1, 1, 2])):
            at = dice.randrange(len(head))
            head[at : at + dice.choice([0, 1, 1, 1, 3])] = bytes(
                [dice.choice([dice.randrange(256), *b'0123456789"{}[],:'])]
            )
        file.write_bytes(safetensors(bytes(head), bytes(20)))
        try:
            found = {spec.name: (spec.dtype, spec.shape) for spec, _ in read_shard_header(file)}
        except UserError as error:
            assert "\n" not in error.message
            continue
        passed += 1
        with safe_open(file, "numpy") as judge:
            slices = {name: judge.get_slice(name) for name in judge.keys()}  # noqa: SIM118
            assert found == {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    assert passed > 25


def test_weights_that_are_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / SINGLE)
    assert complaint(tmp_path) == f"{tmp_path / SINGLE}: not a file"


def test_header_length_beyond_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "truncated or not safetensors" in complaint(tmp_path)


def test_weights_that_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SINGLE).mkdir()
    assert SINGLE in complaint(tmp_path)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda f: single(f, {"a": entry(0, 8, [4], "BF16"), "b": entry(8, 12)}, 12), "BF16"),
        (lambda f: single(f, {"a": entry(0, 8, [8], "I8"), "b": entry(8, 12)}, 12), "F32"),
    ],
)
def test_dtype_is_the_float_that_holds_most_bytes(tmp_path: Path, make: Callable[[Path], Path], expected: str) -> None:
    header: Header = read_header(make(tmp_path))
    assert header.dtype == expected


def llama_of(folder: Path, layers: int) -> Header:
    """A config of `layers` layers above a checkpoint of one tensor."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    single(folder, {"a": entry(0, 8)}, 8)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers, **sizes}))
    return read_header(folder)


def test_more_layers_than_tensors_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    header = llama_of(tmp_path, 1_000_000)
    with pytest.raises(UserError) as caught:
        family_of(header).sizes(header)
    assert caught.value.message == "config.json: num_hidden_layers is 1000000, but the checkpoint holds 1 tensor"
    assert family_of(header).sizes(header.planned(header.config, [])).layers == 1_000_000  # nothing to compare with


def test_as_many_layers_as_tensors_are_for_the_plan_to_judge(tmp_path: Path) -> None:
    header = llama_of(tmp_path, 1)
    assert family_of(header).sizes(header).layers == 1
