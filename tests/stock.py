"""Stock transformers as the judge: load a folder with its own classes, complain about any key, give logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `folder` in eval mode; fails on missing, unexpected or mismatched keys."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits for `inputs`."""
    found: torch.Tensor = model(**inputs).logits.float()
    return found
