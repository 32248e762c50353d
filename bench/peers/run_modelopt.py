"""NVIDIA ModelOpt: weight-only INT8 without data, exported as a Hugging Face folder.

Stock transformers does not know the layout it exports, so the model is judged as ModelOpt has it in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
from _report import Job, main
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantized(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG)
    return model


def weight_only(job: Job) -> None:
    export_hf_checkpoint(quantized(job.model), export_dir=str(job.out))  # leaves int8 codes in the model itself
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)


if __name__ == "__main__":
    method = "INT8-weight-only"
    main({method: weight_only}, ("nvidia-modelopt",), {method: quantized})
