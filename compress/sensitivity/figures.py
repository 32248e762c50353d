"""What the figures of a Sensitivity share: how they look, scales, titles, the line under them, how they are saved.

The figures belong to no window and to no global list: a notebook shows what a cell returns, a script saves it with
`figure.savefig`. Needs pandas and matplotlib (the extra `notebook`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compress.data.spec import HUB

if TYPE_CHECKING:
    from compress.sensitivity import Sensitivity

MODULES = {"heads": "attention", "ffn": "FFN"}
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


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """NAME.png and NAME.svg in `folder`: the same bytes for the same numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(files[0], dpi=150, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(files[1], metadata={"Date": None})
    return files


def measured_on(figure: Figure, found: Sensitivity) -> None:
    """Under the picture of an analysis, small: which model was measured, by what criterion, on what text."""
    about = found.about
    source = about["calibration"]["source"]
    shares = source.items() if isinstance(source, dict) else [(source, None)]
    texts = [_short(name) + ("" if share is None else f" {share:.0%}") for name, share in shares]
    name, _, commit = Path(about["model"]["name"]).name.partition("@")
    name += f"@{commit[:8]}" if commit else ""
    told = f"{name}, {found.criterion}, {about['calibration']['tokens']:,} tokens of " + " + ".join(texts)
    room = int(19 * figure.get_size_inches()[0])  # characters of this size
    figure.supxlabel("\n".join(wrap(told, room)), fontsize=7, color="0.45", x=0.995, ha="right")


def _short(source: str) -> str:
    """A source of text without the folders that a file lies in."""
    return source if source.startswith(HUB) else Path(source).name


def titled(figure: Figure, axes: Axes, title: str, marks: Sequence[str]) -> None:
    """A title, and below it what the marks in the picture mean, in lines that it has room for."""
    room = int(13 * (figure.get_size_inches()[0] - 1.5))  # characters of this size an inch, beside scale and colour bar
    axes.set_title("\n".join([*wrap(title, room), *wrap("; ".join(marks), room)]), fontsize=10)


def log_norm(cells: Any) -> LogNorm:
    """A log scale over four decades at most, and a few of the least below it: one dead head would take half of it."""
    top = float(np.nanmax(cells))
    if top <= 0:
        return LogNorm(1e-4, 1)
    return LogNorm(max(float(np.quantile(cells[cells > 0], 0.02)), top / 10**4), top)


def name_outliers(axes: Axes, middles: Mapping[int, float], above: bool = False) -> None:
    """Name the lines that run at least a factor of 3 below the median line (or above it), at most four of them."""
    median = float(np.median(list(middles.values())))
    if above:
        far = sorted(((cost, layer) for layer, cost in middles.items() if cost > 3 * median), reverse=True)
    else:
        far = sorted((cost, layer) for layer, cost in middles.items() if 0 < cost < median / 3)
    names: list[tuple[float, list[int]]] = []
    for cost, layer in far[:4]:
        if names and max(cost, names[-1][0]) < 1.5 * min(cost, names[-1][0]):  # names would lie on each other
            names[-1][1].append(layer)
        else:
            names.append((cost, [layer]))
    for cost, near in names:
        place = {"xytext": (-2, 6), "ha": "right"} if above else {"xytext": (8, -9)}
        noun = "layer" if len(near) == 1 else "layers"
        told = f"{noun} {', '.join(map(str, sorted(near)))}"
        apart = [withStroke(linewidth=2.5, foreground="white")]  # from a line that passes behind the name
        axes.annotate(told, (0.5, cost), textcoords="offset points", fontsize=8, path_effects=apart, **place)


def percent() -> FuncFormatter:
    """As many digits as a share needs: 2.5 % is neither 2 nor 3."""
    return FuncFormatter(lambda share, at: f"{100 * share:g}%")


def whole_ticks(axis: Any, count: int) -> None:
    """Ticks at layers or heads: all of them while they are few, else round numbers."""
    if count <= 12:
        axis.set_ticks(range(count))
    else:
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))


def depth_bar(figure: Figure, axes: Axes, norm: Normalize, layers: int) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, DEPTH), ax=axes, pad=0.02)
    bar.set_label("decoder layer")
    whole_ticks(bar.ax.yaxis, layers)
