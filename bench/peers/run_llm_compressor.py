"""llm-compressor: 8-bit weights rounded to nearest without data, by `oneshot` and by `model_free_ptq`.

Its preset W8A16 has groups of 128 columns and refuses SmolLM2, whose 576 columns are no multiple of that; so both
schemes are given as its preset W8A8 has them, with one scale a row.
"""

from __future__ import annotations

from typing import Any

from _report import Job, Work, main
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme  # type: ignore[import-untyped]
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD = "lm_head"


def scheme(name: str) -> Any:
    """The preset W8A8; for W8A16 without its rounding of activations."""
    whole = preset_name_to_scheme("W8A8", ["Linear"])
    return whole if name == "W8A8" else QuantizationScheme(targets=whole.targets, weights=whole.weights)


def in_memory(name: str) -> Work:
    """The documented way: load, `oneshot` with a modifier that needs no data, save compressed."""

    def work(job: Job) -> None:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
        oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme(name)}, ignore=[HEAD]))
        model.save_pretrained(job.out, save_compressed=True)
        AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)

    return work


def by_files(name: str) -> Work:
    """File by file, no model is built; the embedding, a matrix like others there, must be ignored by name."""

    def work(job: Job) -> None:
        ignore = [HEAD, "model.embed_tokens"]
        model_free_ptq(job.model, job.out, scheme=scheme(name), ignore=ignore, device="cpu")

    return work


if __name__ == "__main__":
    ways = {"": in_memory, "-model-free": by_files}
    methods = {f"{name}{suffix}": way(name) for name in ("W8A16", "W8A8") for suffix, way in ways.items()}
    main(methods, ("llmcompressor", "compressed-tensors"))
