"""The pictures of a Sensitivity: heads, cost curves, layers, what a cut took. Each function returns a new Figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from compress.checkpoint.per_layer import span
from compress.sensitivity.figures import (
    CMAP,
    COLORS,
    DEPTH,
    MODULES,
    NAMES,
    Picture,
    depth_bar,
    log_norm,
    measured_on,
    name_outliers,
    percent,
    titled,
    whole_ticks,
)

if TYPE_CHECKING:
    from compress.sensitivity import Sensitivity
    from compress.sensitivity.outcome import Outcome


def heads(found: Sensitivity) -> Figure:
    """Layers across, heads down. Of an analysis, colour is the predicted loss without the head, on a log scale; of a
    prune step it is the head's share of its layer's summed cost, and a cross is a head that went."""
    frame = found.units("heads")
    value = "loss" if found.measured else "cost"
    table = frame.pivot(index="unit", columns="layer", values=value)
    cells = table.reindex(columns=range(found.layer_count)).to_numpy()  # [heads, layers]; one that went has no numbers
    if not found.measured:
        totals = np.nansum(cells, 0, keepdims=True)
        cells = np.divide(cells, totals, out=np.full_like(cells, np.nan), where=totals > 0)  # others were not scored
    units, layers = cells.shape
    cell = min(0.42, 16 / max(layers, units))  # inches
    figure = Picture(figsize=(max(6.4, cell * layers + 2.2), max(2.6, cell * units + 1.5)), layout="constrained")
    axes = figure.subplots()
    norm = log_norm(cells) if found.measured else Normalize(0, float(np.nanmax(cells)) or 1)
    image = axes.imshow(cells, cmap=CMAP.with_extremes(bad="0.85"), aspect="auto", norm=norm, interpolation="nearest")
    blocks = {found.balance("heads", layer) for layer in range(layers)}
    edges = range(found.balance("heads"), units, found.balance("heads")) if len(blocks) == 1 else range(0)
    for edge in edges:
        axes.axhline(edge - 0.5, color="white", linewidth=2.5)  # between KV groups
    marks = ["white lines: between KV groups"] if len(edges) else []
    whole_ticks(axes.xaxis, layers)
    whole_ticks(axes.yaxis, units)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("query head")
    if found.measured:
        marks += ["grey: heads that a layer does not have"] if np.isnan(cells).any() else []
        titled(figure, axes, "Predicted rise of the loss without each query head", marks)
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, extend="min")
        bar.set_label("nats a token")
        measured_on(figure, found)
        return figure
    gone = frame[~frame.kept]
    stroke = withStroke(linewidth=3, foreground="black")
    size = 72 * cell * 0.42
    axes.plot(gone.layer, gone.unit, "x", color="white", markersize=size, markeredgewidth=1.4, path_effects=[stroke])
    cut = frame.layer.nunique()
    whole = found.layer_count - cut
    of = f"{len(gone)} of {len(frame)} heads went" + (f" in {cut} layer{'s' * (cut > 1)}" if whole else "")
    marks = [f"crosses: {of}", *([f"grey: {whole} that kept all"] if whole else []), *marks]
    titled(figure, axes, f"{found.criterion} cost of the query heads, normalised in each layer", marks)
    bar = figure.colorbar(image, ax=axes, format=percent(), pad=0.01, aspect=12)
    bar.set_label("share of the\nlayer's summed cost")
    return figure


def losses(found: Sensitivity, group: str) -> Figure:
    """Predicted rise of the loss over the share of units removed, one line a layer; the others stay whole."""
    frame = found.losses(group)
    norm = Normalize(0, max(1, found.layer_count - 1))
    figure = Picture(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    middles = {}
    dots = "o" if len(frame) <= 12 * found.layer_count else None  # few heads: the line is a guess between them
    for layer, part in frame.groupby("layer"):
        shown = part[part.gone > 0]
        if shown.empty:  # none of its units can go alone
            continue
        axes.plot(shown.removed, shown.loss, color=DEPTH(norm(layer)), linewidth=0.9, marker=dots, markersize=3)
        middle = np.interp(0.5, shown.removed, np.log(shown.loss.clip(lower=1e-12)))  # on the line: the scale is a log
        middles[layer] = float(np.exp(middle))
    name_outliers(axes, middles, above=True)
    positive = frame[frame.loss > 0].loss
    if len(positive):
        axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(percent())
    axes.set_xlabel(f"share of the layer's {NAMES.get(group, group)} removed, in the order of the ranking")
    axes.set_ylabel("predicted rise of the loss (nats a token)")
    axes.set_title(
        f"What removing {NAMES.get(group, group)} from one layer costs after the refit, one line a layer", fontsize=10
    )
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    depth_bar(figure, axes, norm, found.layer_count)
    measured_on(figure, found)
    return figure


def layers(found: Sensitivity) -> Figure:
    """Above, how far each layer turns the residual stream; below, the predicted loss without its attention or FFN."""
    frame = found.layers()
    figure = Picture(figsize=(max(6.4, 0.22 * found.layer_count + 2), 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    whole = frame[frame.group == found.groups[0]]
    above.bar(whole.layer, whole.influence, color=COLORS["bar"])
    above.set_ylabel("block influence\n$1 - \\cos(\\mathrm{input}, \\mathrm{output})$")
    above.set_title("How much each decoder layer changes what passes through it", fontsize=10)
    for group, marker, color in zip(found.groups, "os^", (COLORS["before"], COLORS["after"], "0.3"), strict=False):
        part = frame[frame.group == group]
        name = MODULES.get(group, group)
        below.plot(part.layer, part.loss_without, marker, color=color, markersize=4.5, label=f"without its {name}")
    below.set_yscale("log")
    below.set_ylabel("predicted rise of the loss\n(nats a token, second order)")
    below.set_xlabel("decoder layer")
    below.grid(True, axis="y", color="0.9", linewidth=0.6)
    below.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, ncols=2, frameon=False)
    below.set_xlim(-0.7, found.layer_count - 0.3)
    whole_ticks(below.xaxis, found.layer_count)
    measured_on(figure, found)
    return figure


def predicted(outcomes: Sequence[Outcome]) -> Figure:
    """A point a result: the predicted rise of the loss across, the measured one up; on the line they agree."""
    figure = Picture(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    points = [(one.predicted, one.measured) for one in outcomes]
    values = [0.0, *(value for point in points for value in point)]
    edge = 0.08 * (max(values) - min(values)) or 1.0
    ends = (min(values) - (edge if min(values) < 0 else 0), max(values) + 2 * edge)
    axes.plot(ends, ends, color="0.6", linewidth=1, linestyle="--", label="measured as predicted")
    blue = COLORS["after"]
    looks = {None: ("o", blue), "predicted: at least": (">", "white"), "pruned in another way": ("D", "white")}
    for label, (mark, face) in looks.items():
        mine = [at for one, at in zip(outcomes, points, strict=True) if _caveat(one) == label]
        if mine:
            axes.plot(*zip(*mine, strict=True), mark, color=blue, markerfacecolor=face, markersize=6, label=label)
    for index, (one, at) in enumerate(zip(outcomes, points, strict=True)):
        left = at[0] > sum(ends) / 2  # to where there is more room
        place, side = (-8 if left else 8, -10 if index % 2 else 4), "right" if left else "left"
        axes.annotate(_shortened(one.name), at, xytext=place, textcoords="offset points", fontsize=8, ha=side)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    axes.set_xlabel("predicted rise of the loss (nats a token)")
    axes.set_ylabel("measured rise of the loss (nats a token)")
    axes.set_title("Pruned models: predicted against measured", fontsize=10)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    return figure


def _caveat(one: Outcome) -> str | None:
    """What keeps a prediction from being one of what was done."""
    return "predicted: at least" if one.at_least else "pruned in another way" if one.otherwise else None


def _shortened(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}...{name[-most // 2 :]}"


def curves(found: Sensitivity, group: str) -> Figure:
    """Cumulative cost over the share of units removed, one line a layer; a dot where the cut stopped."""
    frame = found.curve(group)
    norm = Normalize(0, max(1, found.layer_count - 1))
    figure = Picture(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    ends = found.layers().query("group == @group").set_index("layer")
    stops, middles = {}, {}
    for layer, part in frame.groupby("layer"):
        color = DEPTH(norm(layer))
        axes.plot(part.removed, part.cost.where(part.cost > 0), color=color, linewidth=0.9)
        stop = ends.loc[layer]  # beside its line where whole KV groups went, in another order than the curve's
        axes.plot([stop.removed], [stop.removed_cost], "o", color=color, markersize=3.5)
        stops[layer] = float(stop.removed)
        middles[layer] = float(part.cost.iloc[len(part) // 2])
    name_outliers(axes, middles)
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    early = frame[(frame.removed >= 0.01) & (frame.cost > 0)].cost
    axes.set_ylim(bottom=0.7 * early.min())  # the first few of thousands of neurons would take half the picture
    axes.xaxis.set_major_formatter(percent())
    axes.set_xlabel(f"{NAMES.get(group, group)} removed, in the order of the ranking (share of the layer's)")
    axes.set_ylabel("cumulative cost (share of the layer's sum)")
    axes.set_title(f"{found.criterion} cost of removing {NAMES.get(group, group)}, one line a layer", fontsize=10)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    if len(set(stops.values())) == 1:
        at = next(iter(stops.values()))
        axes.axvline(at, color="0.25", linestyle="--", linewidth=1)
        side = "left" if at < 0.7 else "right"
        axes.annotate(f" the cut: {at:.1%} ", (at, 0.03), xycoords=("data", "axes fraction"), ha=side)
    depth_bar(figure, axes, norm, found.layer_count)
    return figure


def cut(found: Sensitivity) -> Figure:
    """A column a group: above, the share of the cost that went; below, the output error before and after the refit."""
    frame = found.layers()
    groups = found.groups
    figure = Picture(figsize=(6.2 * len(groups), 5.6), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False, sharex=True)
    for column, group in enumerate(groups):
        part = frame[frame.group == group]
        _share_panel(panels[0, column], part, group, found.layer_count)
        _error_panel(panels[1, column], part, refit=bool(found.about.get("refit", True)))
        whole_ticks(panels[1, column].xaxis, found.layer_count)
        panels[1, column].set_xlim(-0.7, found.layer_count - 0.3)
        panels[1, column].set_xlabel("decoder layer")
    panels[0, 0].set_ylabel("share removed")
    panels[1, 0].set_ylabel("relative output error\n$\\|Y'-Y\\|^2 / \\|Y\\|^2$")
    return figure


def _share_panel(axes: Axes, part: Any, group: str, layers: int) -> None:
    axes.bar(part.layer, part.removed_cost, color=COLORS["bar"], label="of the layer's summed cost")
    axes.step(
        part.layer,
        part.removed,
        where="mid",
        color="0.2",
        linewidth=1.2,
        linestyle="--",
        label="of the units",
        marker=".",
    )
    axes.yaxis.set_major_formatter(percent())
    axes.set_ylim(0, 1.45 * float(np.nanmax([part.removed.max(), part.removed_cost.max()])))
    sizes = f"{span(part.units.tolist())} -> {span(part.kept.tolist())}"
    where = "a layer" if len(part) == layers else f"in {len(part)} of {layers} layers"
    axes.set_title(f"{NAMES.get(group, group)}: {sizes} {where}", fontsize=10)
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
