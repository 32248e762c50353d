"""Folders that stock transformers does not load, read as the equal stock classes want them.

The flavour native of glm4v holds the very tensors of the portable flavour, but for the order of the rotary rows in
q_proj and k_proj. So the stock classes of the latter compute it, when those rows are put in their order on the way in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compress.arch import Family, described
from compress.arch.rope import Orders, arranged, row_orders
from compress.checkpoint.headers import Header
from compress.checkpoint.reader import Reader


def stock_view(family: Family, config: Mapping[str, Any]) -> tuple[dict[str, Any], Orders]:
    """The config under which stock classes compute `config`, and the order in which they take rows of a layer."""
    if family.stock is None:
        return dict(config), {}
    equal = family.stock.config(config)
    header = Header(config=config, tensors={}, locations={})
    return equal, row_orders(family.sizes(header), header.text_config, family.rope, described(equal).rope)


class Arranged(Reader):
    """`inner`, whose layers' tensors come with their rows in the order of `orders`; it opens no file of its own."""

    def __init__(self, inner: Reader, layers: str, orders: Orders) -> None:
        super().__init__(inner.folder, inner.header, inner.device)
        self._inner, self._layers, self._orders = inner, layers, orders

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return arranged(self._inside(name), self._inner.tensor(name, dtype), self._orders)

    def rows(self, name: str, index: Sequence[int] | slice, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self._inside(name).rpartition(".")[0] in self._orders:
            raise ValueError(f"rows of '{name}' have other places here: read the whole tensor")
        return self._inner.rows(name, index, dtype)

    def _inside(self, name: str) -> str:
        """`model.layers.3.self_attn.q_proj.weight` -> `self_attn.q_proj.weight`; as it is outside the layers."""
        return name.removeprefix(self._layers).split(".", 1)[1] if name.startswith(self._layers) else name
