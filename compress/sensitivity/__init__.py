"""What is known of every unit, for notebooks: a sensitivity folder, or the scores that pruning left in a result.

Arrays and checks need numpy only; frames need pandas and figures matplotlib, both of the extra `notebook`, imported
where they are used. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from compress.checkpoint.per_layer import span
from compress.curves import DOCUMENT, Curves, each, read_curves
from compress.errors import UserError, did_you_mean
from compress.sensitivity.outcome import Outcome, outcome
from compress.sensitivity.read import Floats, Ints, Key, read_scores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Counts = tuple[int, ...]  # one a layer


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
    """What one analysis or one prune step found. Layers and units count from 0, as they were in the model measured.

    `about` is sensitivity.json, or a prune step's importance.json. `cost`, `order`, `keep` map (layer, group) to
    arrays: the cost of each unit [units], in the criterion's own measure; the units in the order of the ranking
    [units]; the units that stayed [kept], ascending: empty for an analysis. Groups that a prune step did not cut are
    not scored, nor those of a layer that went as a whole. `measured`: the predicted losses of an analysis; None for a
    prune step.
    """

    step: str
    about: Mapping[str, Any]
    cost: Mapping[Key, Floats]
    order: Mapping[Key, Ints]
    keep: Mapping[Key, Ints]
    measured: Curves | None = None

    def __repr__(self) -> str:
        sizes = []
        for name in self.groups:
            kept = [len(self.keep[layer, name]) for layer in self._scored(name)] if not self.measured else None
            where = f" in {len(kept)} of them" if kept and len(kept) < self.layer_count else ""
            sizes.append(f"{name} {span(self._size(name)[0])}" + (f" -> {span(kept)}{where}" if kept else ""))
        named = [self.about["model"]["name"]] if self.measured else []
        parts = [*named, self.criterion, f"{self.layer_count} layers", *sizes]
        return f"Sensitivity({self.step}: {', '.join(parts)})"

    @property
    def criterion(self) -> str:
        """The criterion that ranked the units, as recipes name it."""
        return str(self.about["criterion"])

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that were scored (and, by a prune step, cut): `heads`, `ffn` or both."""
        return tuple(self._sizes())

    @property
    def layer_count(self) -> int:
        """Decoder layers of the model."""
        return len(self.about["layers"])

    def units(self, group: str) -> pd.DataFrame:
        """One row a unit: layer, unit, cost, rank, and `kept` of a prune step, `loss` of an analysis.

        `rank` is the place in the order in which units go, 0 first: every KV group loses equally many heads, so the
        cheapest head of each goes before the second cheapest of any (where `kv_merge: drop` takes whole groups, `kept`
        alone says what went). `loss`: the predicted rise of the loss when that unit alone goes and the others are
        refitted, nats a token. Raises UserError for a group without scores.
        """
        _, balance = self._size(group)
        columns: list[list[npt.NDArray[Any]]] = []
        for layer in self._scored(group):
            cost = self.cost[layer, group]
            unit = np.arange(len(cost))
            rank = np.empty_like(unit)
            rank[removal_order(self.order[layer, group], balance[layer])] = unit
            more = self.measured.unit_loss if self.measured else None
            last = np.isin(unit, self.keep[layer, group]) if more is None else more[layer, group]
            columns.append([np.full_like(unit, layer), unit, cost, rank, last])
        return _frame(("layer", "unit", "cost", "rank", "loss" if self.measured else "kept"), columns)

    def layers(self) -> pd.DataFrame:
        """One row a layer and group.

        Of a prune step: layer, group, units, kept, removed, removed_cost, error, error_without_refit. `removed`: share
        of the units that went; `removed_cost`: their share of the layer's summed cost. Errors are relative output
        errors ||Y' - Y||^2 / ||Y||^2 of the matrix that reads the units, on the calibration inputs: as written, and
        before the refit; NaN where neither criterion nor refit took a Gram matrix.

        Of an analysis: layer, group, units, influence, angular_distance, energy, loss_without. Of the whole layer:
        influence 1 - cos(input, output), angular distance arccos / pi, both means over the tokens. Of the group:
        mean square of its output, relative to the layer's input; predicted rise of the loss without it, nats a token.
        """
        names: tuple[str, ...] = ("influence", "angular_distance", "energy", "loss_without")
        if not self.measured:
            names = ("kept", "removed", "removed_cost", "error", "error_without_refit")
        rows = [
            self._row(layer, group) for layer, entry in enumerate(self.about["layers"]) for group in entry["groups"]
        ]
        return optional("pandas").DataFrame(rows, columns=("layer", "group", "units", *names))

    def _row(self, layer: int, group: str) -> dict[str, Any]:
        entry, cost = self.about["layers"][layer], self.cost[layer, group]
        row: dict[str, Any] = {"layer": layer, "group": group, "units": len(cost)}
        inner = entry["groups"][group]
        if self.measured:
            row |= {key: _number(entry.get(key)) for key in ("influence", "angular_distance")}
            return row | {key: _number(inner.get(key)) for key in ("energy", "loss_without")}
        keep, total = self.keep[layer, group], float(cost.sum())
        share = 1 - float(cost[keep].sum()) / total if total > 0 else float("nan")
        row |= {"kept": len(keep), "removed": 1 - len(keep) / len(cost), "removed_cost": share}
        return row | {key: _number(inner.get(key)) for key in ("error", "error_without_refit")}

    def losses(self, group: str) -> pd.DataFrame:
        """The cost curves of an analysis: layer, gone (units), removed (share of the units), loss, error.

        `loss`: predicted rise of the loss when so many units of that layer alone have gone, in the order of
        `units(group).rank`, and the others are refitted, nats a token; `error`: the relative output error then.
        """
        curves, units = self.curves_measured().curves, self._size(group)[0]
        columns: list[list[npt.NDArray[Any]]] = []
        for layer in range(self.layer_count):
            one = curves[layer, group]
            columns.append(
                [np.full_like(one.removed, layer), one.removed, one.removed / units[layer], one.loss, one.error]
            )
        return _frame(("layer", "gone", "removed", "loss", "error"), columns)

    def kv_groups(self) -> pd.DataFrame:
        """One row a KV head of an analysis: layer, kv_head, cost (the sum of its query heads'), loss (predicted when
        all its query heads go, the others refitted, nats a token)."""
        found, columns = self.curves_measured(), []
        self._size("heads")
        for layer in range(self.layer_count):
            cost = found.cost[layer, "kv"]
            columns.append([np.full(len(cost), layer), np.arange(len(cost)), cost, found.unit_loss[layer, "kv"]])
        return _frame(("layer", "kv_head", "cost", "loss"), columns)

    def predicted(self, keep: Mapping[str, int | Sequence[int]]) -> float:
        """Predicted rise of the loss, nats a token, when every layer keeps so many units of each group named: a count,
        or one a layer. Losses of layers and groups are added, as if none saw the others' errors. Where more units go
        than a curve was measured for, its last value counts: see `ends_before`."""
        curves = self.curves_measured().curves
        return sum(curves[layer, group].at(gone) for layer, group, gone in self._going(keep))

    def ends_before(self, keep: Mapping[str, int | Sequence[int]]) -> bool:
        """Whether more units go somewhere than curves were measured for: `predicted` is then the least of it."""
        curves = self.curves_measured().curves
        return any(gone > curves[layer, group].removed[-1] for layer, group, gone in self._going(keep))

    def _going(self, keep: Mapping[str, int | Sequence[int]]) -> Iterator[tuple[int, str, int]]:
        """How many units of each layer and group go."""
        for group, count in keep.items():
            units = self._size(group)[0]
            counts = [count] * self.layer_count if isinstance(count, (int, np.integer)) else list(count)
            if len(counts) != self.layer_count or not all(0 <= n <= of for n, of in zip(counts, units, strict=False)):
                has = ", ".join(map(str, sorted(set(units))))
                raise UserError(f"{group}: found {count}, allowed: a count from 0 to {has}, or one for each layer")
            yield from ((layer, group, units[layer] - one) for layer, one in enumerate(counts))

    def curve(self, group: str) -> pd.DataFrame:
        """The cost curve of every layer: layer, gone (units), removed (share of the units), cost.

        `cost` is the summed cost of the units that have gone, as a share of the layer's total: from 0 at none to 1 at
        all. The units go in the order of `units(group).rank`. Raises UserError for a group without scores.
        """
        _, balance = self._size(group)
        columns: list[list[npt.NDArray[Any]]] = []
        for layer in self._scored(group):
            cost = self.cost[layer, group]
            order = removal_order(self.order[layer, group], balance[layer])
            gone = np.arange(len(cost) + 1)
            summed = np.concatenate([[0.0], np.cumsum(cost[order])])
            share = summed / summed[-1] if summed[-1] > 0 else np.full(len(gone), np.nan)
            columns.append([np.full_like(gone, layer), gone, gone / len(cost), share])
        return _frame(("layer", "gone", "removed", "cost"), columns)

    def plot_heads(self) -> Figure:
        """Heat map of the query heads by layer. Of an analysis: the predicted loss without each head. Of a prune step:
        each head's share of its layer's summed cost, because only heads of one layer compete; what went is crossed."""
        self._size("heads")
        return cast("Figure", _figure("heads", self))

    def plot_curves(self, group: str = "ffn") -> Figure:
        """A line a layer, coloured by depth, on a log scale: the predicted losses of `losses(group)`; of a prune step
        the costs of `curve(group)`, a dot at its cut. Raises UserError where no unit can go: heads that have a KV head
        each."""
        if not self._curved(group):
            raise UserError(f"{self.step}: no {group} of any layer can go, so there is no curve")
        return cast("Figure", _figure("losses" if self.measured else "curves", self, group))

    def plot_layers(self) -> Figure:
        """How much each layer does: its block influence, and the predicted loss without its attention or its FFN."""
        self.curves_measured()
        return cast("Figure", _figure("layers", self))

    def plot_predicted(self, results: Sequence[str | Path]) -> Figure:
        """Predicted against measured rise of the loss of prune results (folders with a receipt.json)."""
        return cast("Figure", _figure("predicted", [outcome(self, Path(result)) for result in results]))

    def save_predicted(self, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
        """The picture of `plot_predicted`, as PNG and SVG, in `folder`."""
        return _saved(_figure("predicted", outcomes), folder, "predicted")

    def plot_cut(self) -> Figure:
        """What the cut took, layer by layer and group by group: share of the cost, and the output error before and
        after the refit. Raises UserError where nothing was cut."""
        if self.measured or not self.groups:
            raise UserError(f"{self.step} cut nothing; there are no scores to show")
        return cast("Figure", _figure("cut", self))

    def save_pictures(self, folder: Path) -> list[Path]:
        """Every picture there is, as PNG and SVG, into a new `folder`."""
        makers: dict[str, Callable[[], Figure]] = {
            f"curves-{group}": partial(self.plot_curves, group) for group in self.groups if self._curved(group)
        }
        if "heads" in self.groups:
            makers["heads"] = self.plot_heads
        if self.measured:
            makers["layers"] = self.plot_layers
        elif self.groups:
            makers["cut"] = self.plot_cut
        return [path for name, make in makers.items() for path in _saved(make(), folder, name)]

    def sizes(self, group: str) -> Counts:
        """Units of every layer, whether they were scored there or not."""
        return self._size(group)[0]

    def balance(self, group: str, layer: int = 0) -> int:
        """Units of one balance block, which loses as many as every other: the query heads of one KV head; for the FFN
        all neurons of the layer."""
        return self._size(group)[1][layer]

    def _curved(self, group: str) -> bool:
        """Whether the group has a curve: always, after a prune step."""
        self._size(group)
        found = self.measured
        return found is None or any(len(found.curves[layer, group].removed) > 1 for layer in range(self.layer_count))

    def curves_measured(self) -> Curves:
        """The predicted losses of an analysis. Raises UserError for a prune step."""
        if self.measured is None:
            raise UserError(
                f"{self.step}: the scores of a prune step predict no loss",
                hint="autoglm-compress sensitivity MODEL -o DIR measures a model",
            )
        return self.measured

    def _sizes(self) -> dict[str, tuple[Counts, Counts]]:
        """(units, balance) of the groups that were scored, each layer by layer."""
        found: dict[str, tuple[Counts, Counts]] = {}
        for name, size in self.about["groups"].items():
            units, balance = (each(size[key], self.layer_count) for key in ("units", "balance"))
            if self._scored(name) and units and balance:
                found[name] = units, balance
        return found

    def _scored(self, group: str) -> list[int]:
        """The layers whose units were ranked: all, but for those that went as a whole."""
        return [layer for layer in range(self.layer_count) if (layer, group) in self.cost]

    def _size(self, group: str) -> tuple[Counts, Counts]:
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
    """What `measure_sensitivity` (or the command) wrote into `folder`, or the scores that a prune step left in the
    result `folder`: the only one, or the one named (`1-prune`).

    Raises UserError: no such folder, nothing of either in it, several prune steps and none named, an unknown step,
    files that are missing, damaged or contradict each other.
    """
    home = Path(folder).expanduser()
    if (home / DOCUMENT).is_file():
        if step is not None:
            raise UserError(f"{home}: an analysis, which has no steps, found step {step!r}")
        found = read_curves(home)
        return Sensitivity(home.name, found.about, found.cost, found.order, {}, found)
    name, about, scores = read_scores(home, step)
    return Sensitivity(name, about, scores["cost"], scores["order"], scores["keep"])


def _figure(name: str, *arguments: Any) -> Any:
    """What a function of compress.sensitivity.plots makes, which needs all of the extra."""
    for module in ("pandas", "matplotlib"):
        optional(module)
    return getattr(import_module("compress.sensitivity.plots"), name)(*arguments)


def _saved(figure: Any, folder: Path, name: str) -> list[Path]:
    """The files of a picture."""
    files: list[Path] = import_module("compress.sensitivity.figures").save(figure, folder, name)
    return files


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _frame(names: Sequence[str], parts: Sequence[Sequence[npt.NDArray[Any]]]) -> pd.DataFrame:
    """A frame of columns `names` from one list of columns a layer."""
    joined = (np.concatenate(column) for column in zip(*parts, strict=True))
    return optional("pandas").DataFrame(dict(zip(names, joined, strict=True)))
