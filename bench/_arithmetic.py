"""What pruning one decoder layer takes, from shapes alone: products, statistics, factorisation, bytes moved.

T tokens; P a layer's parameters before the cut, Q after it; of every group that is cut: n columns before, k after, d
rows of the matrix that reads them. The layer runs twice, whole for the statistics and cut for what it hands on
(2 P T + 2 Q T); H = X^T X is 2 T n^2; the refit takes W H (2 d n^2), a Cholesky factor of H over the kept columns
(k^3 / 3), two triangular solves (2 d k^2), and the output errors for the receipt, after the refit (2 d k^2) and without
(2 d (n - k)^2). Attention's own products and everything that is no matrix product are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.limits import DOUBLE_UP_TO
from compress.machine import cpu_precision

Document = Mapping[str, Any]
FORWARD, GRAM, FACTOR, REFIT = "forward", "statistics H", "factorisation", "refit"


def operations(model: Document, prune: Document, tokens: int) -> list[tuple[str, str, float]]:
    """(part, what bounds it: a name of bench/_rates.py, floating-point operations) of one layer.

    `model`: what `inspect --json` says; `prune`: the prune step of what `plan --json` says.
    """
    sizes, layers = model["sizes"], model["sizes"]["layers"]
    before = model["decoder_parameters"] / layers
    after = before - (model["parameters"] - prune["parameters"]) / layers
    parts = [(FORWARD, "bf16" if cpu_precision().native else "f32", 2 * (before + after) * tokens)]
    rows = sizes["hidden"]
    for group, width in (("ffn", 1), ("heads", sizes["head_dim"])):
        was, stays = (units * width for units in prune[group])
        if was == stays:
            continue
        wide = "f64" if was <= DOUBLE_UP_TO else "f32"
        parts += [
            (GRAM, "f32", 2 * tokens * was**2),
            (REFIT, "f32", 2 * rows * was**2),
            (REFIT, wide, 4 * rows * stays**2 + 2 * rows * (was - stays) ** 2),
            (FACTOR, "f64" if wide == "f64" else "cholesky", stays**3 / 3),
        ]
    return parts


def moved(model: Document, last: Document) -> dict[str, float]:
    """Bytes read and written of one layer; `last`: the last step of the plan. All else passes through unchanged."""
    layers = model["sizes"]["layers"]
    read = model["decoder_parameters"] / layers * model["bytes"] / model["parameters"]
    return {"read": read, "write": read - (model["bytes"] - last["bytes"]) / layers}


def seconds(
    parts: list[tuple[str, str, float]], bytes_: Mapping[str, float], rates: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of one layer by part, at the rates that this machine reached."""
    found: dict[str, float] = {}
    for part, rate, count in parts:
        found[part] = found.get(part, 0.0) + count / rates[rate] / 1e9
    return found | {f"disk, {way}": count / rates[way] / 1e9 for way, count in bytes_.items()}
