"""An analysis as a heat map of characters: a row a layer, the heads, the FFN at growing cuts; fits 80 columns.

A dense character is costly. The shade alone tells it: colour, where a terminal has it, is added to the same characters
and is bright where they are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.text import Text

from compress.limits import ENOUGH
from compress.sensitivity import Sensitivity
from compress.sensitivity.read import Floats

SHADES = ".,:-=+*#%@"  # plain ASCII, from least to most; a blank is a gap between KV groups
COLORS = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
WIDTH = 80
DECADES = 4  # of a map's scale, at most


def summary(found: Sensitivity, folder: Path) -> list[str]:
    """How it was measured, in a few lines: the ranking, tokens a column, where pictures are."""
    lines = [repr(found).removeprefix("Sensitivity(").removesuffix(")")]
    if found.measured is not None:
        text = found.about["calibration"]
        per_column = {name: group["tokens_per_column"] for name, group in found.about["groups"].items()}
        told = ", ".join(f"{name} {value:.1f}" for name, value in per_column.items())
        few = min(per_column.values()) < ENOUGH
        poor = f" (under {ENOUGH}: predictions will be poor; give more samples)" if few else ""
        lines.append(f"{text['tokens']:,} calibration tokens; a column: {told}{poor}")
    if (folder / "pictures").is_dir():
        lines.append(f"pictures: {folder / 'pictures'}")
    return lines


def heat_map(found: Sensitivity) -> list[Text]:
    """Lines to print: for every group a map of predicted losses, layer by layer, and its scale. Empty for the scores
    of a prune step, which predict no loss."""
    if found.measured is None:
        return []
    blocks = []
    if "heads" in found.groups:
        blocks.append(_heads(found))
    blocks += [_curve(found, name) for name in found.groups if name != "heads"]
    beside = sum(len(block[0]) + 3 for block in blocks) + 6 <= WIDTH
    lines: list[Text] = []
    for part in [blocks] if beside else [[block] for block in blocks]:
        lines.append(Text("layer ").append(Text("   ").join(block[0] for block in part)))
        for layer in range(found.layer_count):
            lines.append(Text(f"{layer:>5} ").append(Text("   ").join(block[1 + layer] for block in part)))
        lines += [block[-1] for block in part]
    return lines


def _heads(found: Sensitivity) -> list[Text]:
    measured = found.measured
    assert measured is not None
    balance = found.balance("heads")
    cells = [measured.unit_loss[layer, "heads"] for layer in range(found.layer_count)]
    scale = _scale(np.concatenate(cells))
    most = max(map(len, cells))
    gap = most // balance * (balance + 1) <= WIDTH - 6  # between KV groups
    rows = []
    for layer, row in enumerate(cells):
        line = Text()
        for unit, value in enumerate(row):
            if gap and unit and unit % found.balance("heads", layer) == 0:
                line.append(" ")
            line.append_text(_shade(float(value), scale))
        rows.append(line)
    width = max(5, *map(len, rows))
    for line in rows:
        line.pad_right(width - len(line))
    told = f"heads: nats a token without each head, others refitted; {_told(scale)}"
    return [Text("heads".ljust(width)), *rows, Text(told)]


def _curve(found: Sensitivity, group: str) -> list[Text]:
    measured = found.measured
    assert measured is not None
    units = measured.groups[group].units
    cells = np.array(
        [
            [measured.curves[layer, group].at(share * units[layer]) for share in SHARES]
            for layer in range(found.layer_count)
        ]
    )
    scale = _scale(cells)
    columns = [f"{share:.0%}".rjust(4) for share in SHARES]
    rows = []
    for row in cells:
        line = Text()
        for value in row:
            line.append("  ").append_text(_shade(float(value), scale, 2))
        rows.append(line)
    title = Text("".join(columns))
    told = f"{'FFN' if group == 'ffn' else group}: nats a token with that share of its units removed; {_told(scale)}"
    return [title, *rows, Text(told)]


def _scale(cells: Floats) -> tuple[float, float]:
    """Least and most of a logarithmic scale: DECADES at most below the largest, and a few of the least outside it."""
    top = float(cells.max())
    if top <= 0:
        return 1e-4, 1.0
    return max(float(np.quantile(cells[cells > 0], 0.02)), top / 10**DECADES), top


def _shade(value: float, scale: tuple[float, float], wide: int = 1) -> Text:
    low, high = scale
    place = 0.0 if value <= low or high <= low else np.log(value / low) / np.log(high / low)
    level = min(int(place * len(SHADES)), len(SHADES) - 1)
    return Text(SHADES[level] * wide, style=f"{'white' if level < 5 else 'black'} on {COLORS[level]}")


def _told(scale: Sequence[float]) -> str:
    low, high = scale
    step = (high / low) ** (1 / len(SHADES))
    return f"'{SHADES[0]}' below {low * step:.2g}, '{SHADES[-1]}' {high / step:.2g} to {high:.2g}"
