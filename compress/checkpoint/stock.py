"""A checkpoint as stock transformers holds it: the class that config.json names, and the model whole in memory.

Torch and transformers are imported inside the functions only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import per_layer
from compress.checkpoint.headers import read_json
from compress.errors import UserError

if TYPE_CHECKING:
    import torch


def stock_class(config: Mapping[str, Any], where: Path | str = "config.json") -> Any:
    """The class of transformers that `architectures` names, or ours over one (per_layer); UserError, which opens with
    `where`, if there is none."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and name.startswith(per_layer.PREFIX) and per_layer.is_per_layer(config):
        stock_class({"architectures": [per_layer.stock_name(name)]}, where)
        return per_layer.load_class(per_layer.stock_name(name))
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is None:
        raise UserError(f"{where}: architectures names no class of transformers, found {names!r}")
    return found


def load_stock(folder: Path, dtype: torch.dtype) -> Any:
    """The whole stock model of `folder`, its floats in `dtype`, in eval mode and without gradients.

    Raises UserError for a class that transformers lacks or cannot fill, for the first tensor that is missing, too many
    or of another shape, and for one that holds NaN or infinite values.
    """
    import torch

    config = read_json(folder / "config.json")
    per_layer.check_file(folder, config)
    kind = stock_class(config, folder / "config.json")
    name = kind.__name__
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: {name} cannot be loaded ({line})") from None
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(what):
            raise UserError(f"{folder}: {name} finds {what.replace('_', ' ')}: {min(map(str, info[what]))}")
    for key, value in model.named_parameters():
        if not all(map(math.isfinite, (bound.item() for bound in torch.aminmax(value.detach())))):
            raise UserError(f"{folder}: tensor '{key}' holds NaN or infinite values")
    model.requires_grad_(False)
    return model.eval()
