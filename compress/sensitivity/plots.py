"""The figures of a Sensitivity: heads by layer, cost curves, what the cut took. Each function returns a new Figure.

The figures belong to no window and to no global list: a notebook shows what a cell returns, a script saves it with
`figure.savefig`. Needs pandas and matplotlib (the extra `notebook`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from compress.sensitivity import Sensitivity

NAMES = {"heads": "query heads", "ffn": "FFN neurons"}
COLORS = {"before": "#b3402a", "after": "#1f5a94", "bar": "#9db4c8"}
CMAP = matplotlib.colormaps["viridis"]  # perceptually uniform, readable in grey and by the colour-blind
DEPTH = ListedColormap(CMAP(np.linspace(0, 0.92, 256)))  # its brightest yellow is lost as a thin line on white


class Picture(Figure):
    """A figure that a notebook shows without pyplot, whose list of open figures would show it a second time."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=100)
        return data.getvalue()


def heads(found: Sensitivity) -> Figure:
    """Layers across, heads down; colour is the head's share of its layer's summed cost, a cross is a head that went."""
    frame = found.units("heads")
    table = frame.pivot(index="unit", columns="layer", values="cost").reindex(columns=range(found.layer_count))
    cost = np.nan_to_num(table.to_numpy())  # [heads, layers]; a layer that went as a whole has none
    totals = cost.sum(0, keepdims=True)
    share = np.divide(cost, totals, out=np.zeros_like(cost), where=totals > 0)
    units, layers = share.shape
    cell = min(0.42, 16 / max(layers, units))  # inches
    figure = Picture(figsize=(max(6.4, cell * layers + 2.2), max(2.6, cell * units + 1.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap=CMAP, aspect="auto", vmin=0, interpolation="nearest")
    gone = frame[~frame.kept]
    stroke = withStroke(linewidth=3, foreground="black")
    size = 72 * cell * 0.42
    axes.plot(gone.layer, gone.unit, "x", color="white", markersize=size, markeredgewidth=1.4, path_effects=[stroke])
    for edge in range(found.balance("heads"), units, found.balance("heads")):
        axes.axhline(edge - 0.5, color="white", linewidth=2.5)  # between KV groups
    _whole_ticks(axes.xaxis, layers)
    _whole_ticks(axes.yaxis, units)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("query head")
    axes.set_title(
        f"{found.criterion} cost of the query heads, normalised in each layer\n"
        f"crosses: {len(gone)} of {len(frame)} heads went; white lines: between KV groups",
        fontsize=10,
    )
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=0), pad=0.01, aspect=12)
    bar.set_label("share of the\nlayer's summed cost")
    return figure


def curves(found: Sensitivity, group: str) -> Figure:
    """Cumulative cost over the share of units removed, one line a layer; a dot where the cut stopped."""
    frame = found.curve(group)
    norm = Normalize(0, max(1, found.layer_count - 1))
    figure = Picture(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    stops, middles = {}, {}
    for layer, part in frame.groupby("layer"):
        color = DEPTH(norm(layer))
        axes.plot(part.removed, part.cost.where(part.cost > 0), color=color, linewidth=0.9)
        stop = part.iloc[part.gone.max() - len(found.keep[layer, group])]
        axes.plot([stop.removed], [stop.cost], "o", color=color, markersize=3.5)
        stops[layer] = float(stop.removed)
        middles[layer] = float(part.cost.iloc[len(part) // 2])
    _name_outliers(axes, middles)
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    early = frame[(frame.removed >= 0.01) & (frame.cost > 0)].cost
    axes.set_ylim(bottom=0.7 * early.min())  # the first few of thousands of neurons would take half the picture
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"{NAMES.get(group, group)} removed, cheapest first (share of the layer's)")
    axes.set_ylabel("cumulative cost (share of the layer's sum)")
    axes.set_title(f"{found.criterion} cost of removing {NAMES.get(group, group)}, one line a layer", fontsize=10)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    if len(set(stops.values())) == 1:
        at = next(iter(stops.values()))
        axes.axvline(at, color="0.25", linestyle="--", linewidth=1)
        side = "left" if at < 0.7 else "right"
        axes.annotate(f" the cut: {at:.1%} ", (at, 0.03), xycoords=("data", "axes fraction"), ha=side)
    _depth_bar(figure, axes, norm, found.layer_count)
    return figure


def cut(found: Sensitivity) -> Figure:
    """A column a group: above, the share of the cost that went; below, the output error before and after the refit."""
    frame = found.layers()
    groups = found.groups
    figure = Picture(figsize=(6.2 * len(groups), 5.6), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False, sharex=True)
    for column, group in enumerate(groups):
        part = frame[frame.group == group]
        _share_panel(panels[0, column], part, group)
        _error_panel(panels[1, column], part, refit=bool(found.about.get("refit", True)))
        _whole_ticks(panels[1, column].xaxis, found.layer_count)
        panels[1, column].set_xlim(-0.7, found.layer_count - 0.3)
        panels[1, column].set_xlabel("decoder layer")
    panels[0, 0].set_ylabel("share removed")
    panels[1, 0].set_ylabel("relative output error\n$\\|Y'-Y\\|^2 / \\|Y\\|^2$")
    return figure


def _name_outliers(axes: Axes, middles: Mapping[int, float]) -> None:
    """Name the lines that run at least a factor of 3 below the median line, at most four of them."""
    low = sorted((cost, layer) for layer, cost in middles.items() if 0 < cost < np.median(list(middles.values())) / 3)
    for cost, layer in low[:4]:
        axes.annotate(f"layer {layer}", (0.5, cost), xytext=(8, -9), textcoords="offset points", fontsize=8)


def _share_panel(axes: Axes, part: Any, group: str) -> None:
    axes.bar(part.layer, part.removed_cost, color=COLORS["bar"], label="of the layer's summed cost")
    axes.step(part.layer, part.removed, where="mid", color="0.2", linewidth=1.2, linestyle="--", label="of the units")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1.45 * float(np.nanmax([part.removed.max(), part.removed_cost.max()])))
    row = part.iloc[0]
    axes.set_title(f"{NAMES.get(group, group)}: {row.units} -> {row.kept} in every layer", fontsize=10)
    axes.legend(loc="upper right", fontsize=8, ncols=2, frameon=False)


def _error_panel(axes: Axes, part: Any, refit: bool) -> None:
    if part.error.isna().all():
        text = "not measured:\nneither criterion nor refit took a Gram matrix"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
        return
    handles = []
    if refit:
        axes.vlines(part.layer, part.error, part.error_without_refit, color="0.75", linewidth=1.2)
        handles += axes.plot(
            part.layer, part.error_without_refit, "o", color=COLORS["before"], markerfacecolor="white", markersize=4.5
        )
    handles += axes.plot(part.layer, part.error, "o", color=COLORS["after"], markersize=4.5)
    if (part.error > 0).all():
        axes.set_yscale("log")  # an error of exactly 0 has no place on it
    axes.grid(True, axis="y", color="0.9", linewidth=0.6)
    labels = ["without refit", "with refit, as written"] if refit else ["as written, no refit"]
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, ncols=2, frameon=False)


def _whole_ticks(axis: Any, count: int) -> None:
    """Ticks at layers or heads: all of them while they are few, else round numbers."""
    if count <= 12:
        axis.set_ticks(range(count))
    else:
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))


def _depth_bar(figure: Figure, axes: Axes, norm: Normalize, layers: int) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, DEPTH), ax=axes, pad=0.02)
    bar.set_label("decoder layer")
    _whole_ticks(bar.ax.yaxis, layers)
