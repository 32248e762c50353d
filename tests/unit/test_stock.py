"""A model whole in its stock class: its logits are the source's, and what does not fit is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.stock import load_stock
from compress.errors import UserError
from tests import tiny
from tests.stock import load

NORM = "model.norm.weight"


def test_it_is_the_stock_model_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model", dtype=torch.bfloat16)
    model, ids = load_stock(folder, torch.float32), torch.arange(20)[None]
    assert not model.training and not any(value.requires_grad for value in model.parameters())
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load(folder)(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (NORM, None, f"LlamaForCausalLM finds missing keys: {NORM}"),
        ("model.stray.weight", torch.zeros(2), "LlamaForCausalLM finds unexpected keys: model.stray.weight"),
        (NORM, torch.ones(5), "LlamaForCausalLM cannot be loaded ("),
        (NORM, torch.full((64,), float("inf")), f"tensor '{NORM}' holds NaN or infinite values"),
    ],
)
def test_weights_that_do_not_fit(name: str, value: torch.Tensor | None, said: str, tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model")
    tensors = {key: old for key, old in load_file(folder / "model.safetensors").items() if key != name}
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_stock(folder, torch.float32)
    assert caught.value.message.startswith(f"{folder}: {said}") and "\n" not in caught.value.message


@pytest.mark.parametrize("names", [["NoSuchModel"], [], None])
def test_a_class_that_there_is_not(names: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": names}))
    with pytest.raises(UserError, match=r"config.json: architectures names no class of transformers, found"):
        load_stock(tmp_path, torch.float32)
