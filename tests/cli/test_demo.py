"""The demo recipe on the real SmolLM2-135M, once, through the command line; shortened so that it takes a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tests.stock import load

SHORT = (
    "data.calibration.samples=4",
    "data.training.length=128",
    "data.evaluation={samples: 2, length: 256}",
    "steps.1={distill: {max_steps: 2, batch: 2}}",
    "gates.max_perplexity_ratio=5",
    "gates.max_kl=2.0",
    "gates.min_top1_agreement=0.3",
)


def test_the_demo_end_to_end(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = [part for override in SHORT for part in ("--set", override)]
    command = [sys.executable, "-m", "compress", "run", "recipes/demo.yaml", "-o", str(out), "--json", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    stages = {row["stage"]: row for row in result["stages"]}
    assert list(stages) == ["dense", "1-prune", "2-distill", "3-quantize"]
    assert stages["dense"]["kl"] == 0 and stages["dense"]["perplexity_ratio"] == 1
    assert stages["2-distill"]["kl"] < stages["1-prune"]["kl"]
    assert 1 < stages["3-quantize"]["perplexity_ratio"] < 5
    assert stages["3-quantize"]["bytes"] < 0.55 * stages["dense"]["bytes"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = load(out, torch.bfloat16)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 8
    assert tokenizer.decode(answer[0]).startswith("The capital of France is")
