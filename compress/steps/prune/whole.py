"""How many decoder layers and KV heads stay, or one clear line why not. From headers, torch-free.

Which layers and heads go, or what becomes of merged heads, is found when the step runs (depth.py, kv.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compress.arch import Family, Sizes
from compress.arch.kv import KV_HEADS, kv_heads
from compress.checkpoint.headers import DTYPE_BYTES, Header
from compress.checkpoint.per_layer import anchored
from compress.steps.prune.decoder import Layer
from compress.steps.prune.options import ALIGNED, DROP, MEAN, PruneOptions
from compress.steps.types import Complain

MERGED = {
    MEAN: "those in a row are averaged",
    ALIGNED: "those in a row become the one that best stands for them",
    DROP: "the least costly go, with the query heads that read them",
}


@dataclass(frozen=True)
class Left:
    """`layers`: as many as stay; they are the first ones, and stand for any. `kv`: how many KV heads stay, where some
    go; they are a group of the layers then."""

    layers: tuple[Layer, ...]
    kv: Mapping[str, int]
    notes: tuple[str, ...]


def layers_left(
    before: Header, family: Family, layers: tuple[Layer, ...], options: PruneOptions, complain: Complain
) -> Left | None:
    """What stays of all `layers` and their KV heads; None after a complaint."""
    keep = len(layers) if options.keep_layers is None else options.keep_layers
    if keep > len(layers):
        complain("keep_layers", f"{keep} layers cannot stay: the model has {len(layers)}")
        return None
    if keep < len(layers) and family.fixed_depth is not None:
        complain("keep_layers", f"layers of this {family.name} cannot go: {family.fixed_depth}")
        return None
    if keep < (first := anchored(before.config)):
        complain("keep_layers", f"{keep} cannot stay alone: images enter the first {first} layers, which do not go")
        return None
    one = layers[0]
    found = _kv_heads(before, family, replace(one.sizes, layers=keep), len(layers), options, complain)
    if found is None:
        return None
    heads, note = found
    fewer = heads < one.sizes.kv_heads
    for key, less in (("keep_layers", keep < len(layers)), (_kv_key(options), fewer)):
        if less and (options.protect or options.pin or len(set(map(id, layers))) > 1):
            complain(key, "not where layers differ in width, by 'protect', 'pin' or in the model as it is")
            return None
    if fewer and family.traced:
        complain(_kv_key(options), f"KV heads of a {family.name} are not merged: no proof of that was tried")
        return None
    if keep < len(layers) and (other := _another_dtype(before, family)):
        complain("keep_layers", other)
        return None
    notes = [note] if note else []
    if keep < len(layers):
        how = f"which ones is found in a forward pass of its own over the calibration ({options.layer_criterion})"
        notes.append(f"{keep} of {len(layers)} decoder layers stay; {how}")
    if fewer:
        notes.append(f"{heads} of {one.sizes.kv_heads} KV heads stay in every layer: {MERGED[options.kv_merge]}")
        one = replace(one, groups={**one.groups, KV_HEADS: kv_heads(one.sizes, one.shapes)})
        layers = (one,) * len(layers)
    return Left(layers[:keep], {KV_HEADS: heads} if fewer else {}, tuple(notes))


def _kv_key(options: PruneOptions) -> str:
    return "keep_kv_heads" if options.kv_cache_bytes is None else "kv_cache_bytes"


def _kv_heads(
    before: Header, family: Family, sizes: Sizes, deep: int, options: PruneOptions, refuse: Complain
) -> tuple[int, str] | None:
    """How many KV heads stay, and how that was found; None after a complaint. `sizes`: of the layers that stay, `deep`:
    how many there were."""
    keep, limit = options.keep_kv_heads, options.kv_cache_bytes
    drop = options.kv_merge == DROP
    counts = [n for n in range(1, sizes.kv_heads + 1) if drop or sizes.kv_heads % n == 0]
    if limit is None:
        if keep is None or keep in counts:
            return keep or sizes.kv_heads, ""
        why = f"; {options.kv_merge} joins as many into each" if keep < sizes.kv_heads else ""
        fewer = ", ".join(map(str, counts[:-1])) or "none"
        refuse("keep_kv_heads", f"{keep} of {sizes.kv_heads} KV heads cannot stay{why}; fewer that can: {fewer}")
        return None
    if keep is not None:
        refuse("kv_cache_bytes", "'kv_cache_bytes' and 'keep_kv_heads' exclude each other: each sets the KV heads")
        return None

    def cache(count: int) -> int:
        return replace(sizes, kv_heads=count).kv_cache(DTYPE_BYTES[before.dtype])

    def loadable(count: int) -> bool:
        fewer = replace(sizes, heads=count * sizes.group_size, kv_heads=count)
        return count == sizes.kv_heads or family.label(before.config, fewer, options.flavour)[0] is not None

    counts = [count for count in counts if loadable(count)] if drop else counts  # merged ones leave the heads as many

    def told(count: int) -> str:
        return f"{count} KV head{'s' if count > 1 else ''}: {cache(count):,} bytes a token"

    fits = [count for count in counts if cache(count) <= limit]
    if not fits:
        refuse("kv_cache_bytes", f"{limit:,} cannot be reached: the smallest is {told(counts[0])}")
        return None
    if fits == counts and sizes.layers == deep:
        refuse("kv_cache_bytes", f"{limit:,} removes nothing: the model stays within it as it is ({told(counts[-1])})")
        return None
    more = f"; the next is {told(counts[len(fits)])}" if len(fits) < len(counts) else ""
    return fits[-1], f"kv_cache_bytes {limit:,}: {told(fits[-1])}, the most that fit{more}"


def _another_dtype(before: Header, family: Family) -> str | None:
    """Why not any layer can take the place of any other: two are stored in different dtypes."""
    first, inside = family.prefix(0), family.inside
    for name, spec in before.tensors.items():
        if name.startswith(inside):
            like = before.tensors.get(first + name.removeprefix(inside).partition(".")[2])
            if like is not None and like.dtype != spec.dtype:
                return f"tensor '{name}' is {spec.dtype}, that of layer 0 is {like.dtype}"
    return None
