"""What pruning found out about every unit, read back from the folder `sensitivity/` of a result, for notebooks.

Arrays and checks need numpy only; frames need pandas and figures matplotlib, both of the extra `notebook`, imported
where they are used. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compress.checkpoint.headers import read_json
from compress.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Key = tuple[int, str]  # (layer, group)

KINDS = ("cost", "order", "keep")
COUNTS = ("units", "keep", "balance")


def optional(module: str) -> ModuleType:
    """Import a module of the extra `notebook`; a UserError that names the remedy where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = (error.name or module).split(".")[0]
        raise UserError(
            f"{missing} is not installed; sensitivity frames and figures need it",
            hint="pip install 'autoglm-compress[notebook]'",
        ) from None


@dataclass(frozen=True, repr=False, eq=False)
class Sensitivity:
    """The scores of one prune step. Layers and units count from 0, as they were in the model that this step cut.

    `about` is its importance.json. `cost`, `order`, `keep` map (layer, group) to arrays: the cost of each unit
    [units], in the criterion's own measure; the units in the order of the ranking [units]; the units that stayed
    [kept], ascending. Groups that were not cut are not scored, nor are those of a layer that went as a whole.
    """

    step: str
    about: Mapping[str, Any]
    cost: Mapping[Key, Floats]
    order: Mapping[Key, Ints]
    keep: Mapping[Key, Ints]

    def __repr__(self) -> str:
        sizes = [f"{name} {units} -> {kept}" for name, (units, kept, _) in self._sizes().items()]
        parts = [self.criterion, f"{self.layer_count} layers", *sizes]
        return f"Sensitivity({self.step}: {', '.join(parts)})"

    @property
    def criterion(self) -> str:
        """The criterion that ranked the units, as recipes name it."""
        return str(self.about["criterion"])

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that were scored and cut: `heads`, `ffn` or both."""
        return tuple(self._sizes())

    @property
    def layer_count(self) -> int:
        """Decoder layers of the model."""
        return len(self.about["layers"])

    def units(self, group: str) -> pd.DataFrame:
        """One row a unit: layer, unit, cost, rank, kept.

        `rank` is the place in the order in which units go, 0 first: every KV group loses equally many heads, so the
        cheapest head of each goes before the second cheapest of any. Raises UserError for a group without scores.
        """
        _, _, balance = self._size(group)
        columns: list[list[npt.NDArray[Any]]] = []
        for layer in self._scored(group):
            cost = self.cost[layer, group]
            unit = np.arange(len(cost))
            rank = np.empty_like(unit)
            rank[removal_order(self.order[layer, group], balance)] = unit
            columns.append([np.full_like(unit, layer), unit, cost, rank, np.isin(unit, self.keep[layer, group])])
        return _frame(("layer", "unit", "cost", "rank", "kept"), columns)

    def layers(self) -> pd.DataFrame:
        """One row a layer and group: layer, group, units, kept, removed, removed_cost, error, error_without_refit.

        `removed`: share of the units that went; `removed_cost`: their share of the layer's summed cost. Errors are
        relative output errors ||Y' - Y||^2 / ||Y||^2 of the matrix that reads the units, on the calibration inputs:
        as written, and before the refit; NaN where neither criterion nor refit took a Gram matrix.
        """
        rows = []
        for layer, entry in enumerate(self.about["layers"]):
            for group in entry["groups"]:
                cost, keep = self.cost[layer, group], self.keep[layer, group]
                total = float(cost.sum())
                errors = {key: _number(entry["groups"][group].get(key)) for key in ("error", "error_without_refit")}
                shares = {
                    "removed": 1 - len(keep) / len(cost),
                    "removed_cost": 1 - float(cost[keep].sum()) / total if total > 0 else float("nan"),
                }
                rows.append({"layer": layer, "group": group, "units": len(cost), "kept": len(keep), **shares, **errors})
        names = ("layer", "group", "units", "kept", "removed", "removed_cost", "error", "error_without_refit")
        return optional("pandas").DataFrame(rows, columns=names)

    def curve(self, group: str) -> pd.DataFrame:
        """The cost curve of every layer: layer, gone (units), removed (share of the units), cost.

        `cost` is the summed cost of the units that have gone, as a share of the layer's total: from 0 at none to 1 at
        all. The units go in the order of `units(group).rank`. Raises UserError for a group without scores.
        """
        _, _, balance = self._size(group)
        columns: list[list[npt.NDArray[Any]]] = []
        for layer in self._scored(group):
            cost = self.cost[layer, group]
            order = removal_order(self.order[layer, group], balance)
            gone = np.arange(len(cost) + 1)
            summed = np.concatenate([[0.0], np.cumsum(cost[order])])
            share = summed / summed[-1] if summed[-1] > 0 else np.full(len(gone), np.nan)
            columns.append([np.full_like(gone, layer), gone, gone / len(cost), share])
        return _frame(("layer", "gone", "removed", "cost"), columns)

    def plot_heads(self) -> Figure:
        """Heat map of the query heads by layer: each head's share of its layer's summed cost; what went is crossed.

        Shares, because costs grow by orders of magnitude with depth and only heads of one layer compete.
        """
        self._size("heads")
        return _figure("heads", self)

    def plot_curves(self, group: str = "ffn") -> Figure:
        """The cost curves of `curve(group)` on a log scale: a line a layer, coloured by depth, a dot at its cut."""
        self._size(group)
        return _figure("curves", self, group)

    def plot_cut(self) -> Figure:
        """What the cut took, layer by layer and group by group: share of the cost, and the output error before and
        after the refit. Raises UserError where nothing was cut."""
        if not self.groups:
            raise UserError(f"{self.step} cut nothing; there are no scores to show")
        return _figure("cut", self)

    def balance(self, group: str) -> int:
        """Units of one balance block, which loses as many as every other: the query heads of one KV head; for the FFN
        all neurons of the layer."""
        return self._size(group)[2]

    def _sizes(self) -> dict[str, tuple[int, int, int]]:
        """(units, kept, balance) of the groups that were scored."""
        described = self.about["groups"]
        return {
            name: (size["units"], size["keep"], size["balance"])
            for name, size in described.items()
            if self._scored(name)
        }

    def _scored(self, group: str) -> list[int]:
        """The layers whose units were ranked: all, but for those that went as a whole."""
        return [layer for layer in range(self.layer_count) if (layer, group) in self.cost]

    def _size(self, group: str) -> tuple[int, int, int]:
        sizes = self._sizes()
        if group not in sizes:
            known = group in self.about["groups"]
            why = f"; it cut {', '.join(sizes) or 'nothing'}" if known else did_you_mean(group, self.about["groups"])
            raise UserError(f"{self.step} has no scores of '{group}'{why}")
        return sizes[group]


def removal_order(order: Ints, balance: int) -> Ints:
    """The units [units] in the order in which a growing cut takes them, from the ranking `order` [units].

    Blocks of `balance` units lose equally many, so the first of every block go before any block's second.
    """
    blocks = order // balance
    place = np.empty_like(order)  # of each entry within its block
    for block in np.unique(blocks):
        inside = blocks == block
        place[inside] = np.arange(int(inside.sum()))
    removed: Ints = order[np.argsort(place, kind="stable")]
    return removed


def load_sensitivity(folder: str | Path, step: str | None = None) -> Sensitivity:
    """The scores that a prune step left in the result `folder`: the only one, or the one named (`1-prune`).

    Raises UserError: no such folder, no scores in it, several prune steps and none named, an unknown step, files that
    are missing, damaged or contradict each other.
    """
    home = Path(folder).expanduser() / "sensitivity"
    if not home.parent.is_dir():
        raise UserError(f"{folder}: no such folder")
    steps = sorted(path.name for path in home.glob("*") if path.is_dir())
    if not steps:
        raise UserError(f"{home}: no saved scores; {folder} is not the result of a prune step")
    if step is None and len(steps) > 1:
        raise UserError(f"{home}: several prune steps", hint=f"name one, step='{steps[0]}'; found {', '.join(steps)}")
    name = steps[0] if step is None else step
    if name not in steps:
        raise UserError(f"{home}: no step '{name}'{did_you_mean(name, steps)}")
    about = _read_about(home / name / "importance.json")
    found = _read_scores(home / name / "importance.safetensors", about)
    return Sensitivity(name, about, found["cost"], found["order"], found["keep"])


def _read_about(path: Path) -> dict[str, Any]:
    """importance.json with everything that is read from it checked."""
    about = read_json(path)
    groups, layers = about.get("groups"), about.get("layers")
    fine = (
        isinstance(about.get("criterion"), str)
        and isinstance(groups, dict)
        and all(_positive_counts(size) for size in groups.values())
        and isinstance(layers, list)
        and layers
        and all(isinstance(entry, dict) and _described(entry.get("groups"), groups) for entry in layers)
        and len({frozenset(entry["groups"]) for entry in layers if entry["groups"]}) <= 1
    )
    if not fine:
        raise UserError(f"{path}: not what a prune step writes (criterion, groups, layers)")
    return about


def _positive_counts(size: Any) -> bool:
    return isinstance(size, dict) and all(type(size.get(key)) is int and size[key] > 0 for key in COUNTS)


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
            wrong = _wrong(cost, order, keep, about["groups"][group])
            if wrong:
                raise UserError(f"{path}: layers.{layer}.{group}: {wrong}")
    return found


def _wrong(cost: Floats, order: Ints, keep: Ints, size: Mapping[str, int]) -> str | None:
    """What contradicts importance.json, or makes no sense; None when all is well."""
    units = size["units"]
    if cost.shape != (units,):
        return f"{list(cost.shape)} costs, importance.json says {units} units"
    if not np.isfinite(cost).all():
        return "a cost is NaN or infinite"
    if not np.array_equal(np.sort(order), np.arange(units)):
        return f"order is not a permutation of {units} units"
    if keep.ndim != 1 or not len(keep) or len(np.unique(keep)) != len(keep) or keep.min() < 0 or keep.max() >= units:
        return f"keep does not name units below {units}, each once"
    return None


def _figure(name: str, *arguments: Any) -> Figure:
    """A figure of compress.sensitivity.plots, which needs all of the extra."""
    for module in ("pandas", "matplotlib"):
        optional(module)
    figure: Figure = getattr(import_module("compress.sensitivity.plots"), name)(*arguments)
    return figure


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _frame(names: Sequence[str], parts: Sequence[Sequence[npt.NDArray[Any]]]) -> pd.DataFrame:
    """A frame of columns `names` from one list of columns a layer."""
    joined = (np.concatenate(column) for column in zip(*parts, strict=True))
    return optional("pandas").DataFrame(dict(zip(names, joined, strict=True)))
