"""Two analyses (or prune steps) side by side: how alike they rank, and which units a given cut would choose otherwise.

numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.checkpoint.per_layer import span
from compress.errors import UserError
from compress.sensitivity import Sensitivity, removal_order
from compress.sensitivity.read import Ints


def compare(first: Sensitivity, second: Sensitivity, share: float) -> list[dict[str, Any]]:
    """One row a layer and group that both scored: layer, group, spearman, gone, moved, only_first, only_second.

    spearman: rank correlation of the places in the two orders of removal, 1 for the same order. With `share` of the
    units removed (rounded to what every balance block can lose), gone units go; `moved` of them go in one order alone:
    only_first lists those that go by the first and stay by the second, only_second the reverse.
    Raises UserError where the two have other sizes, or no group in common.
    """
    groups = [name for name in first.groups if name in second.groups]
    if not groups:
        raise UserError(f"{first.step} and {second.step} scored no group that the other did")
    rows = []
    for name in groups:
        sizes = [one.sizes(name) for one in (first, second)]
        if sizes[0] != sizes[1]:
            told = " and ".join(f"{len(units)} layers of {span(units)} {name}" for units in sizes)
            raise UserError(f"{first.step} and {second.step} cannot be compared: {told}")
        for layer in range(first.layer_count):
            if (layer, name) in first.order and (layer, name) in second.order:  # a prune step may have left it whole
                orders = first.order[layer, name], second.order[layer, name]
                rows.append({"layer": layer, "group": name, **_pair(*orders, first.balance(name, layer), share)})
    if not rows:
        raise UserError(f"{first.step} and {second.step} scored no group of a layer that the other did")
    return rows


def _pair(first: Ints, second: Ints, balance: int, share: float) -> dict[str, Any]:
    orders = [removal_order(order, balance) for order in (first, second)]
    blocks = len(first) // balance
    gone = min(round(share * balance), balance - 1) * blocks
    leaving = [set(order[:gone].tolist()) for order in orders]
    return {
        "spearman": spearman(np.argsort(orders[0]), np.argsort(orders[1])),
        "gone": gone,
        "moved": len(leaving[0] - leaving[1]),
        "only_first": sorted(leaving[0] - leaving[1]),
        "only_second": sorted(leaving[1] - leaving[0]),
    }


def spearman(first: Ints, second: Ints) -> float:
    """Rank correlation of two permutations of the same places: 1 - 6 sum d^2 / (n (n^2 - 1)); 1 for a single unit."""
    count = len(first)
    if count < 2:
        return 1.0
    apart = (first - second).astype(np.float64)
    return 1 - 6 * float((apart * apart).sum()) / (count * (count * count - 1))


def mean_by_group(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a group: the mean of spearman, and gone and moved of all its layers."""
    found = []
    for name in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == name]
        sums = {key: sum(row[key] for row in mine) for key in ("spearman", "gone", "moved")}
        found.append({"group": name, **sums, "spearman": sums["spearman"] / len(mine)})
    return found
