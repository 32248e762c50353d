"""KV heads as units that can go: the rows of k and v of a layer, fused with q or not. Torch-free.

`Family.groups` does not hold them: no one criterion ranks them, and query heads follow them (steps/prune/kv.py).
"""

from __future__ import annotations

from collections.abc import Container

from compress.arch.family import Cut, Group, Sizes
from compress.arch.layer import QKV, QKV_FUSED

KV_HEADS = "kv_heads"
K_NORM = "self_attn.k_norm.weight"  # a norm over each head's keys, before they rotate


def kv_heads(sizes: Sizes, names: Container[str]) -> Group:
    """The KV heads of a layer that has the tensors `names`: rows of k, then of v, and their biases."""
    d = sizes.head_dim
    fused = f"{QKV_FUSED}.weight" in names
    first = sizes.heads * d
    rows = [(QKV_FUSED, first), (QKV_FUSED, first + sizes.kv_heads * d)] if fused else [(name, 0) for name in QKV[1:]]
    cuts = [
        Cut(f"{name}.{kind}", 0, offset, d)
        for kind in ("weight", "bias")
        for name, offset in rows
        if f"{name}.{kind}" in names
    ]
    return Group(KV_HEADS, sizes.kv_heads, "self_attn.o_proj", d, tuple(cuts), "num_key_value_heads", 1)
