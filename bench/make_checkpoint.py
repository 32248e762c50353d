"""Write a checkpoint of real width and any depth with seeded random weights, so that every command takes it.

    .venv/bin/python bench/make_checkpoint.py glm-4.1v-9b FOLDER --layers 4

glm-4.1v-9b: exactly GLM-4.1V-9B's config but for the number of layers (4 layers: 5.9 GB), with processor files and a
byte tokenizer whose marks have the model's own ids. llama-1k: hidden size 1024, 11.3 M parameters a layer. Tensors are
made and written one after another, large ones in blocks of rows; each has its own seed, drawn from --seed and its name.
Their spread is like that of trained models: norms near 1, matrices of 0.02 with unequal rows and columns, a few columns
many times larger.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _results import say
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.checkpoint.headers import TensorSpec
from compress.checkpoint.writer import Writer
from tests.sparse import GLM41V_9B, Shapes, glm4v_shapes, llama_shapes

BLOCK = 2**24  # elements drawn at once: 64 MiB in float32
STD, ROWS, COLUMNS = 0.02, 0.3, 0.25  # of a matrix; log-spread of its rows and columns
OUTLIERS, OUTLIER = 256, 6.0  # one column in so many is so many times larger

LLAMA_1K: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
LLAMA_MARKS = {"<bos>": 256, "<eos>": 257}
GLM_MARKS = {
    name: 151329 + index
    for index, name in enumerate(
        [
            "<|endoftext|>",
            "[MASK]",
            "[gMASK]",
            "[sMASK]",
            "<sop>",
            "<eop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
            "<|begin_of_image|>",
            "<|end_of_image|>",
            "<|begin_of_video|>",
            "<|end_of_video|>",
            "<|image|>",
            "<|video|>",
        ]
    )
}
GLM_TEMPLATE = """\
[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>\
{% elif part.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
GLM_IMAGES: dict[str, Any] = {
    "processor_class": "Glm4vProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
GLM_FILES = {
    "preprocessor_config.json": {
        "image_processor_type": "Glm4vImageProcessor",
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
        **GLM_IMAGES,
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Glm4vVideoProcessor",
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000},
        **GLM_IMAGES,
    },
    "generation_config.json": {
        "do_sample": False,
        "eos_token_id": [GLM_MARKS["<|endoftext|>"], GLM_MARKS["<|user|>"], GLM_MARKS["<|observation|>"]],
        "pad_token_id": GLM_MARKS["<|endoftext|>"],
    },
}


@dataclass(frozen=True)
class Kind:
    """What is built: the config, its tensors, and the small files beside them. `marks`: special tokens with their ids,
    `eos` among them."""

    config: Mapping[str, Any]
    shapes: Callable[[Mapping[str, Any]], Shapes]
    marks: Mapping[str, int]
    eos: str
    bos: str | None = None
    template: str | None = None
    files: Mapping[str, Mapping[str, Any]] | None = None

    def of_depth(self, layers: int | None) -> dict[str, Any]:
        """The config with that many decoder layers; None: as many as it says."""
        config = copy.deepcopy(dict(self.config))
        if layers is not None:
            config.get("text_config", config)["num_hidden_layers"] = layers
        return config


KINDS = {
    "glm-4.1v-9b": Kind(
        GLM41V_9B, glm4v_shapes, GLM_MARKS, eos="<|endoftext|>", template=GLM_TEMPLATE, files=GLM_FILES
    ),
    "llama-1k": Kind(LLAMA_1K, llama_shapes, LLAMA_MARKS, eos="<eos>", bos="<bos>"),
}


def build(kind: Kind, folder: Path, layers: int | None, seed: int) -> int:
    """Write the checkpoint, whole or not at all; the bytes of its tensors. Memory: one block of rows."""
    config = kind.of_depth(layers)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in kind.shapes(config).items()]
    with tempfile.TemporaryDirectory() as small, Writer(folder, specs) as writer:
        for spec in specs:
            fill(writer, spec, seed)
        _small_files(kind, Path(small))
        writer.carry(Path(small))
        writer.config(config, Path(small))
    return sum(spec.nbytes for spec in specs)


def fill(writer: Writer, spec: TensorSpec, seed: int) -> None:
    """Draw one tensor and write it: vectors whole, anything else as rows, in blocks."""
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    rows = spec.shape[0]
    if len(spec.shape) == 1:
        centre = 1.0 if "norm" in spec.name and spec.name.endswith("weight") else 0.0
        writer.put(spec.name, (centre + 0.1 * torch.randn(rows, generator=generator)).to(torch.bfloat16))
        return
    columns = spec.parameters // rows
    wide = torch.exp(COLUMNS * torch.randn(columns, generator=generator))
    wide[torch.randperm(columns, generator=generator)[: columns // OUTLIERS]] *= OUTLIER
    high = torch.exp(ROWS * torch.randn(rows, 1, generator=generator))
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        part = high[start : start + step]
        block = torch.randn(len(part), columns, generator=generator).mul_(wide).mul_(STD * part)
        writer.put_rows(spec.name, start, block.to(torch.bfloat16).view(len(part), *spec.shape[1:]))


def tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """One token a byte, and the marks under their own ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, **kind.marks}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in kind.marks])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=kind.bos, eos_token=kind.eos, pad_token=kind.eos)
    made.chat_template = kind.template
    found = {mark: made.convert_tokens_to_ids(mark) for mark in kind.marks}
    if found != dict(kind.marks):
        raise RuntimeError(f"the tokenizer gives its marks other ids: {found}")
    return made


def _small_files(kind: Kind, folder: Path) -> None:
    tokenizer(kind).save_pretrained(folder)
    for name, content in (kind.files or {}).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=list(KINDS))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers; default: as many as the model has")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.folder is None:
        parser.print_help()  # `make bench` starts every script; this one only builds what the others measure
        return
    if given.folder.exists():
        parser.error(f"{given.folder} exists already")
    size = build(KINDS[given.kind], given.folder.absolute(), given.layers, given.seed)
    say(f"{given.folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
