"""A llama GGUF file becomes a Hugging Face folder, one tensor at a time.

Config and tokenizer are what transformers makes of the file; every tensor equals, bit for bit, what its own GGUF
loader gives, but the model is never built and the file is read in pieces, not mapped: memory is one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize

from compress.checkpoint.headers import TensorSpec
from compress.checkpoint.reader import DTYPE_NAMES
from compress.checkpoint.writer import Writer
from compress.errors import UserError
from compress.machine import Progress, Silent

PIECE = 16 * 2**20  # bytes of float32 that are dequantized at a time
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# tables of rope factors that llama.cpp reads: transformers' loader leaves them out, and so do we, but we say so
ROPE_TABLE = "rope_freqs.weight"
FULL, HALF = GGMLQuantizationType.F32, GGMLQuantizationType.F16


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: shape as torch has it (rows first), absolute offset in bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


def convert(
    source: Path, target: Path, *, texts: Mapping[str, str] = MappingProxyType({}), progress: Progress = Silent()
) -> None:
    """Write the GGUF file `source` as the folder `target`; `texts` are further files of it (NOTICE, README.md).

    The dtype is float32 or float16 when all matrices are stored so, else bfloat16. Raises UserError for a broken file
    and for what is not a plain llama; nothing is left of `target` then.
    """
    stored = _read_index(source)
    dtype = _dtype(stored)
    config, tokenizer = _stock(source)
    names = _names(source, stored, config.num_hidden_layers)
    if ROPE_TABLE in stored:
        progress.note(f"{source.name}: {ROPE_TABLE} (rope scaling for long contexts) is left out, as transformers does")
    specs = [TensorSpec(name, DTYPE_NAMES[dtype], stored[old].shape) for old, name in names.items()]
    config.architectures = [ARCHITECTURES[config.model_type]]
    config.dtype = dtype
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    with Writer(target, specs) as writer:
        writer.text("config.json", config.to_json_string())
        writer.text("generation_config.json", _generation_config(config))
        tokenizer.save_pretrained(writer.partial)
        for name, text in texts.items():
            writer.text(name, text)
        with source.open("rb") as handle, progress.task(f"converting {source.name}", total=len(names)) as task:
            for old, name in names.items():
                value = _tensor(handle.fileno(), source, stored[old], dtype)
                count = heads.get(old.split(".")[-2])
                writer.put(name, value if count is None else _unpermuted(value, count))
                task.advance()


def _read_index(source: Path) -> dict[str, Stored]:
    """Every tensor of the file by its GGUF name; refused when the file is broken or not a plain llama."""
    try:
        reader = GGUFReader(source)
        architecture = reader.fields["general.architecture"].contents()
        parts = _number(reader, "split.count")
        experts = _number(reader, "llama.expert_count")
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"{source}: truncated or not GGUF ({error})") from None
    if architecture != "llama" or experts:
        found = f"{architecture} with {experts} experts" if experts else f"'{architecture}'"
        raise UserError(f"{source}: GGUF of the architecture {found}; only dense 'llama' files are read")
    if parts > 1:
        raise UserError(
            f"{source}: one of {parts} parts", hint="join them first: llama-gguf-split --merge FIRST OUT.gguf"
        )
    if reader.byte_order == "S":
        raise UserError(f"{source}: GGUF in the byte order of another machine")
    for kind in {t.tensor_type for t in reader.tensors}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise UserError(f"{source}: holds tensors of the type {kind.name}, which gguf cannot dequantize") from None
    return {t.name: Stored(t.name, t.tensor_type, _shape(t), int(t.data_offset)) for t in reader.tensors}


def _number(reader: GGUFReader, key: str) -> int:
    field = reader.fields.get(key)
    return int(field.contents()) if field else 0


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _dtype(stored: dict[str, Stored]) -> torch.dtype:
    kinds = {t.kind for t in stored.values() if len(t.shape) > 1}
    if kinds == {FULL}:
        return torch.float32
    return torch.float16 if kinds <= {FULL, HALF} else torch.bfloat16


def _stock(source: Path) -> tuple[Any, Any]:
    """Config and tokenizer, as transformers reads them from the file; UserError when it cannot."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:  # its loaders fail with whatever their parsers raise: KeyError, OSError, plain Exception
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{source}: transformers cannot read its config or tokenizer ({said})") from None
    # how the file was opened, not what it says: with these the bytes would differ between online and offline
    for key in ("is_local", "local_files_only", "name_or_path", "gguf_file"):
        tokenizer.init_kwargs.pop(key, None)
    return config, tokenizer


def _generation_config(config: Any) -> str:
    from transformers import GenerationConfig

    ids = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return str(GenerationConfig(**ids).to_json_string())


def _names(source: Path, stored: dict[str, Stored], layers: int) -> dict[str, str]:
    """GGUF name -> name in the folder, in the model's order. `output.weight` is absent when embeddings are tied."""
    names = {f"{old}.weight": f"{new}.weight" for old, new in OUTSIDE.items()}
    for i in range(layers):
        names |= {f"blk.{i}.{old}.weight": f"model.layers.{i}.{new}.weight" for old, new in IN_LAYER.items()}
    missing = [name for name in names if name not in stored and name != "output.weight"]
    if missing:
        raise UserError(f"{source}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
    unknown = [name for name in stored if name not in names and name != ROPE_TABLE]
    if unknown:
        raise UserError(f"{source}: tensor '{unknown[0]}' has no place in a llama model ({len(unknown)} in all)")
    return {old: new for old, new in names.items() if old in stored}


def _tensor(descriptor: int, source: Path, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized tensor, [rows, columns] or [n]; rounded to `dtype` piece by piece."""
    columns = stored.shape[-1]
    value = torch.empty(stored.shape, dtype=dtype)
    matrix = value.view(-1, columns)
    at_once = max(1, PIECE // (4 * columns))
    for start, stop in _spans(len(matrix), at_once):
        raw = np.empty((stop - start, stored.row_bytes), dtype=np.uint8)
        if os.preadv(descriptor, [raw.data], stored.offset + start * stored.row_bytes) != raw.nbytes:
            raise UserError(f"{source}: truncated while reading '{stored.name}'")
        matrix[start:stop] = torch.from_numpy(dequantize(raw, stored.kind))
    return value


def _spans(total: int, at_once: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, at_once):
        yield start, min(start + at_once, total)


def _unpermuted(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rotary rows: per head, interleaved pairs back to two halves.

    [heads * d, hidden], as transformers' LlamaTensorProcessor does it.
    """
    pairs = value.view(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)
