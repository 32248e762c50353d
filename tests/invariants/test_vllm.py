"""Layers that differ in width, in vLLM: the tokens that stock transformers takes, with their log-probabilities.

vLLM lives in an environment of its own, which `make vllm-env` builds; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.per_layer import KEY
from tests import tiny
from tests.invariants.test_per_layer import prune, trusted

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv" / "vllm" / "bin" / "python"
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [10, 20, 30], list(range(40, 90))]
TOKENS = 8
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
# heads of 32: the smallest that vLLM's attention takes
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "head_dim": 32},
    "glm4v": {"hidden_size": 256, "rope_parameters": ROPE},
}
STILL = """\
from transformers import ProcessorMixin


class StillProcessor(ProcessorMixin):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
"""


def with_processor(folder: Path) -> None:
    """What vLLM wants beside a model that sees, even for text: a processor. The stock one of glm46v needs torchvision,
    for videos; this one knows still images."""
    image = {"image_processor_type": "Glm46VImageProcessor", "patch_size": 14, "temporal_patch_size": 2}
    image |= {"merge_size": 2, "size": {"shortest_edge": 3136, "longest_edge": 12544}}
    found = {"processor_class": "StillProcessor", "auto_map": {"AutoProcessor": "processing_still.StillProcessor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(json.dumps(found))
    (folder / "processing_still.py").write_text(STILL)


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The TOKENS likeliest ids after `prompt`, one after another, and the log-probability of each."""
    ids, chosen = torch.tensor([prompt]), []
    for _ in range(TOKENS):
        best, token = model(ids).logits[0, -1].float().log_softmax(-1).max(-1)
        chosen.append(best.item())
        ids = torch.cat([ids, token.view(1, 1)], 1)
    return ids[0, len(prompt) :].tolist(), chosen


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no environment of vLLM; `make vllm-env` builds it")
@pytest.mark.parametrize("family", SIZES)
def test_vllm_takes_the_tokens_of_stock_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = getattr(tiny, family)(tmp_path / "dense", **SIZES[family])
    out = prune(source, tmp_path / "out", pin={"layers.0.mlp": 64, "layers.1.self_attn": 4}, force=True)
    assert KEY in (out / "config.json").read_text()
    model = trusted(out, tmp_path / "modules", monkeypatch)
    more: dict[str, Any] = {}
    if family == "glm4v":
        with_processor(out)
        more["language_model_only"] = True
    line = [str(PYTHON), str(ROOT / "tests" / "vllm_greedy.py"), str(out)]
    line += [json.dumps(each) for each in (PROMPTS, TOKENS, more)]
    # nothing of ours on its path, and the folder's code in a place of this test
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for prompt, found in zip(PROMPTS, json.loads(ran.stdout.splitlines()[-1]), strict=True):
        tokens, chosen = greedy(model, prompt)
        assert found["tokens"] == tokens
        assert found["logprobs"] == pytest.approx(chosen, abs=1e-5)
