"""The picture above the tables of pruning: our default beside its peers, and what the calibration text decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _far_texts import FAR_TEXTS
from _markdown import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

# what is judged on, and what an axis calls it
TEXTS = {"wikitext": "WikiText-2"} | {name: f"{name}\n({far.kind.split(',')[0]})" for name, far in FAR_TEXTS.items()}
PEERS = {  # of the left half, worst last
    "wanda": "ours, as it is by default",
    "wanda-sp": "Wanda-sp",
    "flap-bias": "FLAP, with its biases",
    "llm-pruner": "LLM-Pruner's Taylor",
}
SHAPES = {"ffn": ("from the FFN alone", "#1f5a94"), "heads": ("from heads and FFN", "#9db4c8")}
# of the right half: calibration, method, what it is called, colour, line
LINES = (
    ("builtin", "wanda", "builtin, default", "#8a8a8a", ":"),
    ("wikitext", "wanda", "WikiText-2, default", "#b3402a", "-"),
    ("wikitext", "wanda-per-layer", "WikiText-2, widths by layer", "#b3402a", "--"),
    ("self", "wanda", "self, default", "#c8a400", "-"),
    ("self+wikitext", "wanda", "half self, default", "#1f5a94", "-"),
    ("self+wikitext", "obs-joint-per-layer", "half self, obs, widths by layer, joint refit", "#1f5a94", "--"),
)
SHARE, SEED = 0.20, {"length": 512, "windows": 64}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the picture of what is on file; a bar or a line that was not measured is left out."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _peers(left, rows)
    _texts(right, rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _found(rows: Sequence[Row], **key: Any) -> list[Mapping[str, float]]:
    """The ratios by text of all seeds of what `key` says."""
    wanted = {"ratio": SHARE, **SEED, **key}
    return [row["found"]["ratio"] for row in rows if wanted.items() <= row["key"].items()]


def _peers(axes: Axes, rows: Sequence[Row]) -> None:
    """A group of bars a method, a bar a shape."""
    height = 0.38
    for place, method in enumerate(PEERS):
        for side, (shape, (_, colour)) in enumerate(SHAPES.items()):
            for found in _found(rows, method=method, shape=shape, calibration="wikitext", samples=64)[:1]:
                value = found["wikitext"]
                y = place + (side - 0.5) * height
                axes.barh(y, value - 1, height, left=1, color=colour)
                axes.annotate(f"{value:.2f}", (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(PEERS)), PEERS.values())
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 14)
    _ticks(axes.xaxis, (1, 1.5, 2, 3, 5, 8, 12))
    for name, colour in SHAPES.values():
        axes.barh([0], [0], color=colour, label=name)
    axes.legend(loc="upper right", frameon=False)
    axes.set_title("20 % gone, judged on WikiText-2, calibrated on it\n(64 x 512 tokens; perplexity, times dense)")
    axes.spines[["top", "right"]].set_visible(False)


def _texts(axes: Axes, rows: Sequence[Row]) -> None:
    """A line a calibration and method over the texts; seeds as a bar from the least to the most."""
    for calibration, method, name, colour, line in LINES:
        found = [
            each
            for each in _found(rows, method=method, shape="ffn", calibration=calibration, samples=128)
            if tuple(each) == tuple(TEXTS)
        ]
        if not found:
            continue
        values = [[each[text] for each in found] for text in TEXTS]
        means = [sum(each) / len(each) for each in values]
        spread = [
            [mean - min(each) for mean, each in zip(means, values, strict=True)],
            [max(each) - mean for mean, each in zip(means, values, strict=True)],
        ]
        axes.errorbar(
            list(TEXTS.values()), means, yerr=spread, color=colour, linestyle=line, marker="o", capsize=3, label=name
        )
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_yscale("log")
    _ticks(axes.yaxis, (1.2, 1.4, 1.7, 2, 2.5, 3, 4))
    axes.set_ylim(1.2, 5)
    axes.grid(axis="y", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="calibrated on", frameon=False, fontsize=9, ncols=2, loc="upper left")
    axes.set_title("20 % gone from the FFN, judged on five texts\n(128 x 512 tokens; perplexity, times dense)")
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(axis: Any, places: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))
