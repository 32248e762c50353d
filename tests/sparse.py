"""Checkpoints of any size that take no disk: config.json, safetensors headers, and a hole where the data would be.

Enough for whatever reads headers only: `inspect`, `plan`, `--no-machine`. Nothing here imports torch. The tensors are
described from the config, independently of compress/arch; tests/recipes compares both with stock transformers' names.
Run as a module to make one for measurements: python -m tests.sparse glm41v_9b out/glm41v-9b
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.headers import INDEX, TensorSpec
from compress.checkpoint.layout import SHARD_BYTES, layout

Shapes = dict[str, tuple[int, ...]]

# GLM-4.1V-9B, the architecture of AutoGLM-Phone-9B: 704 tensors
GLM41V_9B_PARAMETERS = 10_292_777_472
GLM41V_9B_BYTES = 20_585_554_944
GLM41V_9B: dict[str, Any] = {
    "architectures": ["Glm4vForConditionalGeneration"],
    "model_type": "glm4v",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "image_start_token_id": 151339,
    "image_end_token_id": 151340,
    "video_start_token_id": 151341,
    "video_end_token_id": 151342,
    "image_token_id": 151343,
    "video_token_id": 151344,
    "text_config": {
        "model_type": "glm4v_text",
        "attention_bias": True,
        "hidden_size": 4096,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "intermediate_size": 13696,
        "vocab_size": 151552,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],
            "partial_rotary_factor": 0.5,
        },
    },
    "vision_config": {
        "model_type": "glm4v_vision",
        "depth": 24,
        "hidden_size": 1536,
        "num_heads": 12,
        "intermediate_size": 13696,
        "out_hidden_size": 4096,
        "in_channels": 3,
        "image_size": 336,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}

# SmolLM2-135M-Instruct, what demo:smollm2-135m is
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def glm41v_9b(folder: Path) -> Path:
    """GLM-4.1V-9B in bf16: 20.6 GB in length, a few KiB on disk."""
    shapes = glm4v_shapes(GLM41V_9B)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    assert len(specs) == 704
    assert sum(spec.parameters for spec in specs) == GLM41V_9B_PARAMETERS
    assert sum(spec.nbytes for spec in specs) == GLM41V_9B_BYTES
    return save(folder, GLM41V_9B, shapes)


def llama(folder: Path, *, shard_bytes: int = SHARD_BYTES, dtype: str = "BF16", **sizes: Any) -> Path:
    """A llama of SmolLM2-135M's sizes; keyword arguments replace keys of its config."""
    config = {**SMOLLM2_135M, **sizes}
    return save(folder, config, llama_shapes(config), shard_bytes=shard_bytes, dtype=dtype)


def glm4v_shapes(config: Mapping[str, Any]) -> Shapes:
    """All tensors of a glm4v, vision tower included, as stock transformers saves them."""
    return {**_glm4v_vision(config["vision_config"]), **_glm4v_text(config["text_config"])}


def _glm4v_vision(config: Mapping[str, Any]) -> Shapes:
    width, out, patch = config["hidden_size"], config["out_hidden_size"], config["patch_size"]
    merge, merger, root = config["spatial_merge_size"], config["intermediate_size"], "model.visual"
    patches = (config["image_size"] // patch) ** 2
    shapes: Shapes = {
        f"{root}.embeddings.position_embedding.weight": (patches, width),
        f"{root}.patch_embed.proj.weight": (width, 3, config["temporal_patch_size"], patch, patch),
        f"{root}.patch_embed.proj.bias": (width,),
    }
    for index in range(config["depth"]):
        block = f"{root}.blocks.{index}"
        shapes |= {
            f"{block}.norm1.weight": (width,),
            f"{block}.norm2.weight": (width,),
            f"{block}.attn.qkv.weight": (3 * width, width),
            f"{block}.attn.proj.weight": (width, width),
            # the blocks' FFN is as wide as the text model; intermediate_size is the merger's
            f"{block}.mlp.gate_proj.weight": (out, width),
            f"{block}.mlp.up_proj.weight": (out, width),
            f"{block}.mlp.down_proj.weight": (width, out),
        }
    return shapes | {
        f"{root}.merger.proj.weight": (out, out),
        f"{root}.merger.post_projection_norm.weight": (out,),
        f"{root}.merger.post_projection_norm.bias": (out,),
        f"{root}.merger.gate_proj.weight": (merger, out),
        f"{root}.merger.up_proj.weight": (merger, out),
        f"{root}.merger.down_proj.weight": (out, merger),
        f"{root}.post_conv_layernorm.weight": (width,),
        f"{root}.downsample.weight": (out, width, merge, merge),
        f"{root}.downsample.bias": (out,),
        f"{root}.post_layernorm.weight": (width,),
    }


def _glm4v_text(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    root = "model.language_model"
    shapes: Shapes = {f"{root}.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"{root}.layers.{index}"
        for name, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            shapes |= {f"{layer}.self_attn.{name}.weight": (rows, hidden), f"{layer}.self_attn.{name}.bias": (rows,)}
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_up_proj.weight": (2 * ffn, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, ffn),
        }
        norms = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
        shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in norms}
    return shapes | {f"{root}.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    """All tensors of a llama without biases; no lm_head when it is tied to the embedding."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.mlp.gate_proj.weight": (ffn, hidden),
            f"{layer}.mlp.up_proj.weight": (ffn, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, ffn),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def save(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "BF16",
) -> Path:
    """Write config.json, the headers, and a tokenizer of one word; every weight reads as zero."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    shards = layout([TensorSpec(name, dtype, shape) for name, shape in shapes.items()], shard_bytes)
    for shard in shards:
        (folder / shard.name).write_bytes(shard.header)
        os.truncate(folder / shard.name, shard.nbytes)
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


if __name__ == "__main__":
    kind, target = sys.argv[1:]
    print({"glm41v_9b": glm41v_9b, "llama": llama}[kind](Path(target)))
