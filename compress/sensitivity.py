"""What pruning found out about every unit, read back from the folder `sensitivity/` of a result. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import read_json
from compress.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Sensitivity:
    """The scores of one prune step. `about` is its importance.json: criterion, groups, layers.

    `cost`, `order`, `keep` map (layer, group) to arrays: the cost of each unit [units], the units in the order they
    go [units], and the units that stayed [kept], ascending.
    """

    step: str
    about: Mapping[str, Any]
    cost: Mapping[tuple[int, str], np.ndarray]
    order: Mapping[tuple[int, str], np.ndarray]
    keep: Mapping[tuple[int, str], np.ndarray]


def load_sensitivity(folder: Path | str, step: str | None = None) -> Sensitivity:
    """The scores that a prune step left in the result `folder`; the only one, or the one named (`1-prune`).

    Raises UserError where there is none, or several and none was named.
    """
    home = Path(folder) / "sensitivity"
    steps = sorted(path.name for path in home.glob("*") if (path / "importance.safetensors").is_file())
    if not steps:
        raise UserError(f"{home}: no saved scores; {folder} is not the result of a prune step")
    if step is None and len(steps) > 1:
        raise UserError(f"{home}: several prune steps, name one of {', '.join(steps)}")
    name = steps[0] if step is None else step
    if name not in steps:
        raise UserError(f"{home}: no step '{name}'{did_you_mean(name, steps)}")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(home / name / "importance.safetensors")
    except SafetensorError as error:
        raise UserError(f"{home / name / 'importance.safetensors'}: not readable ({error})") from None
    found: dict[str, dict[tuple[int, str], np.ndarray]] = {"cost": {}, "order": {}, "keep": {}}
    for key, value in sorted(tensors.items()):
        _, layer, group, kind = key.split(".")  # layers.N.GROUP.KIND
        found[kind][int(layer), group] = value
    return Sensitivity(name, read_json(home / name / "importance.json"), **found)
