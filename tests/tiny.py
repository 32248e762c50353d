"""Pico models built in code: one function a family, each saving a stock checkpoint folder with a small tokenizer.

Weights are random but of realistic spread (a few large input channels), so that importance differs between units.
Run as a module to make the model that recipes/glm4v-tiny-ci.yaml compresses: python -m tests.tiny glm4v out/glm4v-tiny
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB = 384
IMAGE_TOKEN = 300
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
# without head_dim: what hidden_size // heads gives
TEXT = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"num_hidden_layers": 2}


def llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """hidden 64, 3 layers, 8 heads / 2 KV heads, FFN 96; keyword arguments go to LlamaConfig."""
    config = LlamaConfig(**{**LLAMA, **sizes})
    return _save(LlamaForCausalLM(config), folder, seed, dtype, shard)


def mistral(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """As the llama, with 6 heads of 8 beside a hidden size of 64: a shape that stock llama refuses."""
    config = MistralConfig(**{**LLAMA, "num_attention_heads": 6, "sliding_window": None, **sizes})
    return _save(MistralForCausalLM(config), folder, seed, dtype, shard)


def qwen2(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """As the llama with 2 layers, biases of q, k and v, and no head_dim in its config."""
    return _save(Qwen2ForCausalLM(Qwen2Config(**{**TEXT, **sizes})), folder, seed, dtype, shard)


def qwen3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """As the llama with 2 layers, norms over q and k, and 6 heads of 8 beside a hidden size of 64."""
    config = Qwen3Config(**{**TEXT, "num_attention_heads": 6, "head_dim": 8, **sizes})
    return _save(Qwen3ForCausalLM(config), folder, seed, dtype, shard)


def smollm3(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """As the llama with 2 layers, of which the second does not rotate."""
    config = SmolLM3Config(**{**TEXT, "no_rope_layer_interval": 2, "tie_word_embeddings": False, **sizes})
    return _save(SmolLM3ForCausalLM(config), folder, seed, dtype, shard)


def gemma3_text(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """As the llama with 4 layers: two ropes, two windows of 16 tokens, norms over q and k and four a layer."""
    kinds = ["sliding_attention", "full_attention"] * 2
    window = {"layer_types": kinds, "sliding_window": 16, "num_hidden_layers": 4, "tie_word_embeddings": False}
    config = Gemma3TextConfig(**{**LLAMA, **window, "query_pre_attn_scalar": 8, **sizes})
    return _save(Gemma3ForCausalLM(config), folder, seed, dtype, shard)


def glm(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """Hidden 64, 2 layers, 6 heads of 8 / 2 KV heads, fused FFN 96, biases of q, k and v."""
    config = GlmConfig(**{**TEXT, "num_attention_heads": 6, "head_dim": 8, **sizes})
    return _save(GlmForCausalLM(config), folder, seed, dtype, shard)


def glm4(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """As the glm, with 8 heads, four norms a layer and no biases."""
    config = Glm4Config(**{**TEXT, "head_dim": 8, "attention_bias": False, **sizes})
    return _save(Glm4ForCausalLM(config), folder, seed, dtype, shard)


def phi3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """As the llama with 2 layers; q, k and v fused, gate and up fused; 6 of a head's 8 rows rotate."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    return _save(Phi3ForCausalLM(Phi3Config(**{**TEXT, "rope_parameters": rope, **sizes})), folder, seed, dtype, shard)


def undescribed(
    kind: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """A causal language model of any model_type, with the sizes of the pico llama; its own names for keys are given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**LLAMA, **sizes}))
    return _save(model, folder, seed, dtype, shard)


def glm4v(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any) -> Path:
    """Text: hidden 64, 2 layers, 8 heads / 2 KV heads, FFN 128; a vision tower of 2 layers. Keywords: text sizes."""
    config = Glm4vConfig(**_glm(sizes), tie_word_embeddings=False)
    return _save(Glm4vForConditionalGeneration(config), folder, seed, dtype, shard)


def glm46v_interleaved(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """The pico glm4v as glm46v, over the text class of glm4v."""
    config = Glm46VConfig(**_glm({"model_type": "glm4v_text", **sizes}))
    return _save(Glm46VForConditionalGeneration(config), folder, seed, dtype, shard)


def glm46v(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """glm46v over glm_image_text, the flavour portable: 6 heads of 8 beside a hidden size of 64."""
    heads = {"num_attention_heads": 6, "head_dim": 8, "attention_bias": True}
    config = Glm46VConfig(**_glm({"model_type": "glm_image_text", **heads, **sizes}))
    return _save(Glm46VForConditionalGeneration(config), folder, seed, dtype, shard)


def qwen2_5_vl(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """Text: the pico qwen2; a vision tower of 2 layers, one with a window. Keywords: text sizes."""
    config = Qwen2_5_VLConfig(**_qwen({**TEXT, **sizes}, window_size=28, fullatt_block_indexes=[1]))
    return _save(Qwen2_5_VLForConditionalGeneration(config), folder, seed, dtype, shard)


def qwen3_vl(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """Text: the pico qwen3, 3 layers; a vision tower whose inner features go into the first two text layers."""
    text = {**TEXT, "num_attention_heads": 6, "head_dim": 8, "num_hidden_layers": 3, **sizes}
    config = Qwen3VLConfig(**_qwen(text, depth=3, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]))
    return _save(Qwen3VLForConditionalGeneration(config), folder, seed, dtype, shard)


def _qwen(text: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """What the configs of both Qwen vision models share."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    return {
        "text_config": {"rope_parameters": rope, **text},
        "vision_config": {**tower, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 303,
        "vision_start_token_id": 301,
        "vision_end_token_id": 302,
        "tie_word_embeddings": False,
    }


def glm4v_native(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """glm4v with a head_dim of its own, which stock transformers does not load: 6 heads of 8 beside a hidden size of
    64. (The same random numbers as in `glm46v`, under the other label: another model.)"""
    glm46v(folder, seed=seed, dtype=dtype, shard=shard, **sizes)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "glm4v", "architectures": ["Glm4vForConditionalGeneration"]}
    config["text_config"]["model_type"] = "glm4v_text"
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _glm(sizes: dict[str, Any]) -> dict[str, Any]:
    """What the configs of all relatives of glm4v share."""
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": 257,
        "eos_token_id": 257,
        **sizes,
    }
    vision = {
        "model_type": "glm4v_vision",
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": text["hidden_size"],
        "image_size": 56,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": IMAGE_TOKEN,
        "image_start_token_id": 301,
        "image_end_token_id": 302,
        "video_token_id": 303,
        "video_start_token_id": 304,
        "video_end_token_id": 305,
    }


def image_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """One 56 x 56 image (4 x 4 patches, merged to 4 tokens) inside a prompt of 20 tokens, for all vision towers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (1, 20), generator=generator)
    ids[0, 4:10] = torch.tensor([301, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 302])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _save(model: PreTrainedModel, folder: Path, seed: int, dtype: torch.dtype, shard: str) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if value.ndim == 1:
                centre = 1.0 if "norm" in name else 0.0
                value.copy_(centre + 0.1 * torch.randn(value.shape, generator=generator))
            else:
                fan_in = value[0].numel()
                spread = torch.exp(0.5 * torch.randn(value.shape[-1], generator=generator))
                value.copy_(torch.randn(value.shape, generator=generator) * spread * (1.0 / fan_in) ** 0.5)
    module: torch.nn.Module = model
    module.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes, bos, eos and the vision marks of glm4v."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    # nothing merges, so splitting into words changes no id; without it a text takes half the time
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def begins_with_bos(source: Path, target: Path) -> None:
    """Save the tokenizer of `source` into `target`, with a default call that puts <bos> before a text."""
    from tokenizers.processors import TemplateProcessing

    made = AutoTokenizer.from_pretrained(source)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    made.save_pretrained(target)


if __name__ == "__main__":
    kind, target = sys.argv[1:]
    makers = (llama, mistral, qwen2, qwen3, smollm3, gemma3_text, glm, glm4, phi3, glm4v, glm46v, qwen2_5_vl, qwen3_vl)
    print({maker.__name__: maker for maker in makers}[kind](Path(target)))
