"""The order of the rotary rows of a head: `interleaved` pairs rows 2i and 2i+1, `half-split` rows i and i + r/2.

Two stock classes may rotate the same head in either order (Su et al. 2021, arXiv:2104.09864, as GPT-J and as GPT-NeoX
wrote it). Only the first r rows of a head rotate; the rest stay where they are. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.arch.family import Sizes
from compress.errors import UserError

if TYPE_CHECKING:
    import torch

INTERLEAVED = "interleaved"
HALF_SPLIT = "half-split"

Orders = Mapping[str, list[int]]  # module of a layer -> its new row i is its old row order[i]


def rotary_share(config: Mapping[str, Any], untold: float = 1.0) -> float:
    """What share of a head's rows rotates, as stock transformers reads the text config (old spellings included);
    `untold`: what its class fills in. UserError for a share that is no number from 0 to 1."""
    told = config.get("rope_scaling") or config.get("rope_parameters")
    rope = told if isinstance(told, Mapping) else {}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    share = untold if share is None else share
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise UserError(f"config.json: partial_rotary_factor must be a number from 0 to 1, found {share!r}")
    return float(share)


def rotary_rows(sizes: Sizes, config: Mapping[str, Any], untold: float = 1.0) -> int:
    """How many rows of a head rotate, in pairs: stock classes take one angle for every second row, so an odd number of
    them takes one row more. UserError as `rotary_share`."""
    rows = int(sizes.head_dim * rotary_share(config, untold))
    return rows + rows % 2


def head_order(head_dim: int, rotary: int, before: str, after: str) -> list[int]:
    """The rows of one head in the order `after`, as indices into the order `before`."""
    order = list(range(head_dim))
    if before == after:
        return order
    split = [*range(0, rotary, 2), *range(1, rotary, 2)]  # 0, 2, 4 ... 1, 3, 5 ...
    if after == INTERLEAVED:
        split = sorted(range(rotary), key=split.__getitem__)  # the inverse
    return [*split, *order[rotary:]]


def row_orders(sizes: Sizes, config: Mapping[str, Any], before: str, after: str) -> Orders:
    """What becomes of the rows of q_proj and k_proj of every layer; empty when the two orders are one."""
    if before == after:
        return {}
    head = head_order(sizes.head_dim, rotary_rows(sizes, config), before, after)

    def rows(heads: int) -> list[int]:
        return [index * sizes.head_dim + row for index in range(heads) for row in head]

    return {"self_attn.q_proj": rows(sizes.heads), "self_attn.k_proj": rows(sizes.kv_heads)}


def arranged(name: str, value: torch.Tensor, orders: Orders) -> torch.Tensor:
    """A layer's tensor `name` (`self_attn.q_proj.weight`) with its rows in their new places.

    Whatever has one entry a row moves: weights, biases, packed codes and scales.
    """
    order = orders.get(name.rpartition(".")[0])
    if order is None or not value.ndim or len(value) != len(order):
        return value
    import torch

    return value.index_select(0, torch.tensor(order, device=value.device))
