"""Prune and quantize in one pass leave the bytes that the two steps leave, interrupted or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.checkpoint.ledger import Ledger
from compress.cli import main
from compress.receipt import load_receipt
from tests import tiny
from tests.invariants.test_run import contents

RECIPE = """
model: {model}
data: {{calibration: {{samples: 4, length: 64}}, evaluation: {{samples: 2, length: 64}}}}
steps:
  - prune: {{{cut}}}
  - quantize: {{format: {format}}}
evaluate: last
"""
DESCRIBES = {"recipe.yaml", "receipt.json", "measured.json", "README.md"}  # the recipes differ in keep_intermediate
FUSED = ["--set", "keep_intermediate=false"]


def run(folder: Path, name: str, *more: str, code: int = 0) -> dict[str, bytes]:
    out = folder / name
    line = ["run", str(folder / "recipe.yaml"), "-o", str(out), "--threads", "1", "--checkpoint-every", "0", "-q"]
    assert main([*line, *more]) == code
    return {} if code else {k: v for k, v in contents(out).items() if k not in DESCRIBES}


@pytest.mark.parametrize(
    ("family", "cut", "format", "dtype"),
    [
        ("llama", "ratio: 0.3, heads: 0.5", "int8", "bfloat16"),
        ("llama", "ffn: 0.25", "w8a16", "float16"),
        ("glm4v", "keep_ffn: 96, keep_heads: 4", "int8", "float32"),
        ("glm4v", "ffn: 0.25", "bf16", "float32"),
    ],
)
def test_one_pass_leaves_the_bytes_of_two(family: str, cut: str, format: str, dtype: str, tmp_path: Path) -> None:
    import torch

    model = getattr(tiny, family)(tmp_path / "model", dtype=getattr(torch, dtype))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model, cut=cut, format=format))
    apart, fused = run(tmp_path, "apart"), run(tmp_path, "fused", *FUSED)
    assert fused == apart and any(name.endswith(".safetensors") for name in fused)
    one, two = load_receipt(tmp_path / "fused"), load_receipt(tmp_path / "apart")
    assert one["stages"][-1] == two["stages"][-1]
    for fused_step, apart_step in zip(one["steps"], two["steps"], strict=True):
        differ = {key for key in apart_step if fused_step[key] != apart_step[key]}
        assert differ <= {"self_check"}, differ


def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model, cut="ffn: 0.25", format="int8"))
    whole = run(tmp_path, "whole", *FUSED)
    real = Ledger.save

    def once(self: Ledger, *state: object) -> None:
        real(self, *state)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "save", once)
        run(tmp_path, "out", *FUSED, code=130)
    assert not any((tmp_path / "out.work").glob("1-prune*"))  # nothing lies between the steps
    assert run(tmp_path, "out", *FUSED) == whole
