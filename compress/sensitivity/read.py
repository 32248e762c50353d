"""The scores of a prune step, read from the folder `sensitivity/` of its result, each file checked. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.checkpoint.headers import read_json
from compress.curves import each
from compress.errors import UserError, did_you_mean

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Key = tuple[int, str]  # (layer, group)

KINDS = ("cost", "order", "keep")
COUNTS = ("units", "keep", "balance")  # of a group: one number, or one a layer


def read_scores(folder: Path, step: str | None) -> tuple[str, dict[str, Any], dict[str, dict[Key, Any]]]:
    """The step's name, its importance.json, and by kind the arrays of every layer and group. Raises UserError: no such
    folder, no scores in it, several prune steps and none named, an unknown step, files that are missing, damaged or
    contradict each other."""
    home = folder / "sensitivity"
    if not home.parent.is_dir():
        raise UserError(f"{folder}: no such folder")
    steps = sorted(path.name for path in home.glob("*") if path.is_dir())
    if not steps:
        raise UserError(f"{home}: no saved scores; {folder} is neither a sensitivity folder nor a prune step's result")
    if step is None and len(steps) > 1:
        raise UserError(
            f"{home}: several prune steps",
            hint=f"compress.load_sensitivity(folder, step='{steps[0]}') shows one; found {', '.join(steps)}",
        )
    name = steps[0] if step is None else step
    if name not in steps:
        raise UserError(f"{home}: no step '{name}'{did_you_mean(name, steps)}")
    about = _read_about(home / name / "importance.json")
    return name, about, _read_scores(home / name / "importance.safetensors", about)


def _read_about(path: Path) -> dict[str, Any]:
    """importance.json with everything that is read from it checked."""
    about = read_json(path)
    groups, layers = about.get("groups"), about.get("layers")
    fine = (
        isinstance(about.get("criterion"), str)
        and isinstance(groups, dict)
        and isinstance(layers, list)
        and layers
        and all(_positive_counts(size, len(layers)) for size in groups.values())
        and all(isinstance(entry, dict) and _described(entry.get("groups"), groups) for entry in layers)
    )
    if not fine:
        raise UserError(f"{path}: not what a prune step writes (criterion, groups, layers)")
    return about


def _positive_counts(size: Any, layers: int) -> bool:
    return isinstance(size, dict) and all(each(size.get(key), layers) is not None for key in COUNTS)


def _described(entry: Any, groups: Mapping[str, Any]) -> bool:
    return isinstance(entry, dict) and all(name in groups and isinstance(entry[name], dict) for name in entry)


def _read_scores(path: Path, about: Mapping[str, Any]) -> dict[str, dict[Key, Any]]:
    """The tensors `layers.N.GROUP.KIND` that importance.json promises, each with the right size and content."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    found: dict[str, dict[Key, Any]] = {kind: {} for kind in KINDS}
    for layer, entry in enumerate(about["layers"]):
        for group in entry["groups"]:
            for kind in KINDS:
                name = f"layers.{layer}.{group}.{kind}"
                if name not in tensors:
                    raise UserError(f"{path}: tensor '{name}' is missing")
                found[kind][layer, group] = tensors[name].astype(np.float64 if kind == "cost" else np.int64)
            cost, order, keep = (found[kind][layer, group] for kind in KINDS)
            units = each(about["groups"][group]["units"], len(about["layers"]))
            assert units is not None  # _read_about has looked
            wrong = _wrong(cost, order, keep, units[layer])
            if wrong:
                raise UserError(f"{path}: layers.{layer}.{group}: {wrong}")
    return found


def _wrong(cost: Floats, order: Ints, keep: Ints, units: int) -> str | None:
    """What contradicts importance.json, or makes no sense; None when all is well."""
    if cost.shape != (units,):
        return f"{list(cost.shape)} costs, importance.json says {units} units"
    if not np.isfinite(cost).all():
        return "a cost is NaN or infinite"
    if not np.array_equal(np.sort(order), np.arange(units)):
        return f"order is not a permutation of {units} units"
    if keep.ndim != 1 or not len(keep) or len(np.unique(keep)) != len(keep) or keep.min() < 0 or keep.max() >= units:
        return f"keep does not name units below {units}, each once"
    return None
