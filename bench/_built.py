"""Write a llama of any depth with random weights, one shard a layer, so that no machine holds it whole.

    .venv/bin/python bench/_built.py FOLDER --layers 64

Hidden size 1024, FFN 2816, 16 heads of 64 on 4 KV heads, vocabulary 8192, bfloat16, tied embedding: 11.3 M parameters
a layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from _results import ROOT
from safetensors.torch import save_file

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 2816, 16, 4, 64, 8192


def build(folder: Path, layers: int) -> None:
    """config.json, a byte-level tokenizer, and the shards with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(layers), indent=1))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for index in range(layers + 1):
        if index < layers:
            tensors = _layer(f"model.layers.{index}.", generator)
        else:
            tensors = {"model.embed_tokens.weight": _random((VOCAB, HIDDEN), generator), "model.norm.weight": _ones()}
        name = f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=1))
    sys.path.insert(0, str(ROOT))
    from tests.tiny import tokenizer

    tokenizer().save_pretrained(folder)


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


def _layer(prefix: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    tensors = {prefix + name: _random(shape, generator) for name, shape in shapes.items()}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return tensors | {prefix + name: _ones() for name in norms}


def _random(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Normal, of variance 1 / fan-in."""
    return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(torch.bfloat16)


def _ones() -> torch.Tensor:
    return torch.ones(HIDDEN, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    given = parser.parse_args()
    build(given.folder, given.layers)


if __name__ == "__main__":
    main()
