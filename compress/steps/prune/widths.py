"""How many units stay: shares, exact counts and size targets to widths, or one clear line why not. From headers.

Layers may differ, in the source and by what is fixed by hand; every other layer follows one rule, within its own width.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from compress.arch import Sizes
from compress.arch.kv import KV_HEADS
from compress.steps.prune.decoder import Decoder, Keeps, Layer, own, whole_ffn, whole_heads, width_multiple
from compress.steps.prune.options import DROP, PruneOptions
from compress.steps.types import Complain

WITHIN = 0.015  # a target is met when the largest reachable size is at most this share below it
SHARES = ("ratio", "ffn", "heads")
EXACT = ("keep_ffn", "keep_heads")
WHOLE = ("keep_layers", "keep_kv_heads", "kv_cache_bytes")  # counted beside the shares
TOWER = ("keep_vision_layers", "keep_vision_ffn")  # of the vision tower (tower.py)
TARGETS = ("params", "bytes")
BUDGETS = ("ratio", *TARGETS)
WIDTHS = ("ratio", "ffn", "keep_ffn", *TARGETS)  # each says how wide the FFN becomes


def resolve(options: PruneOptions, decoder: Decoder, complain: Complain) -> tuple[Keeps, tuple[str, ...]] | None:
    """The units that stay in every layer, and how a width was chosen; None after a complaint."""
    given = [key for key in (*SHARES, *EXACT, *WHOLE, *TOWER, *TARGETS) if getattr(options, key) is not None]
    if not given and not any(decoder.fixed[at] < own(decoder.layers[at[0]], at[1]) for at in decoder.fixed):
        complain("", f"nothing to prune: give one of {', '.join((*SHARES, *EXACT, *WHOLE, *TOWER, *TARGETS))}, or pin")
        return None
    clash = _clash(given)
    if clash is not None:
        complain(*clash)
        return None
    heads = heads_rule(options, decoder, complain)
    if heads is None:
        return None
    return follow(options, decoder, heads, complain)


def follow(
    options: PruneOptions,
    decoder: Decoder,
    heads: Callable[[Layer], int],
    complain: Complain,
    within: float = WITHIN,
    narrower: int = 0,
) -> tuple[Keeps, tuple[str, ...]] | None:
    """What stays when every layer keeps the heads that the rule `heads` says, and how the FFN width was chosen; a size
    given as a target is met by what is at most the share `within` below it, a share by the nearest width or by one
    that is so many multiples `narrower`."""
    if options.params is not None or options.bytes is not None:
        return _to_target(options, decoder, heads, complain, within)
    ffn = _ffn(options, decoder, heads, complain, narrower)
    if ffn is None:
        return None
    keeps = decoder.keeps(heads, ffn)
    return keeps, _width_notes(options, decoder, keeps, "a multiple" if narrower else "the nearest multiple")


def _width_notes(options: PruneOptions, decoder: Decoder, keeps: Keeps, which: str) -> tuple[str, ...]:
    free = [i for i in range(len(keeps)) if (i, "ffn") not in decoder.fixed]
    cut = [keeps[i]["ffn"] for i in free if keeps[i]["ffn"] != own(decoder.layers[i], "ffn")]
    if options.keep_ffn is not None or not cut:
        return ()
    hidden = decoder.sizes.hidden
    widths = f"width {cut[0]}" if len(set(cut)) == 1 else f"widths {min(cut)} to {max(cut)}"
    return (f"FFN {widths}: {which} of {width_multiple(hidden)}, because hidden size is {hidden}",)


def _clash(given: list[str]) -> tuple[str, str] | None:
    """The key at fault and what is wrong, when two of the given keys do not go together."""
    widths = [key for key in given if key in WIDTHS]
    targets = [key for key in given if key in TARGETS]
    if targets and len(widths) > 1:
        other = next(key for key in widths if key != targets[0])
        return targets[0], f"'{targets[0]}' and '{other}' exclude each other: each sets the FFN width"
    shares, exact = [k for k in given if k in SHARES], [k for k in given if k in EXACT]
    if shares and exact:
        return exact[0], f"'{exact[0]}' (what stays) and '{shares[0]}' (share removed) exclude each other"
    if len(widths) > 1:
        return "ffn", "'ratio' and 'ffn' exclude each other: with ratio the FFN takes what the heads leave"
    return None


def heads_rule(options: PruneOptions, decoder: Decoder, refuse: Complain) -> Callable[[Layer], int] | None:
    """How many heads a layer keeps."""
    sizes = _with_kv_heads(options, decoder)
    if options.keep_heads is not None:
        stay = options.keep_heads
        whose = "the model has" if sizes is decoder.most_heads else "the KV heads that stay have"
        if stay > sizes.heads or stay % sizes.kv_heads:
            refuse(
                "keep_heads",
                f"{stay} heads cannot stay: {whose} {sizes.heads}, and every one of "
                f"{sizes.kv_heads} KV heads keeps equally many (a multiple of {sizes.kv_heads}, at most {sizes.heads})",
            )
            return None
        return lambda layer: stay
    if options.heads is None:
        return lambda layer: min(own(layer, "heads"), sizes.heads)  # all that read a KV head that stays
    share = options.heads
    gone = round(share * sizes.group_size)
    if not 0 < gone < sizes.group_size:
        steps = [f"{n / sizes.group_size:.4f}" for n in range(1, sizes.group_size)]
        allowed = ", ".join(steps) if steps else "none: every KV head has one query head only"
        refuse(
            "heads",
            f"{share} of {sizes.group_size} query heads per KV head rounds to {gone} of them; "
            f"the shares that can go are {allowed}",
        )
        return None
    # in a layer that has fewer than the most, one head a KV head stays at least
    return lambda layer: sizes.kv_heads * max(1, layer.sizes.group_size - round(share * layer.sizes.group_size))


def _with_kv_heads(options: PruneOptions, decoder: Decoder) -> Sizes:
    """The sizes of which query heads are taken: without those of KV heads that are dropped."""
    sizes = decoder.most_heads
    if options.kv_merge != DROP or not decoder.kv:
        return sizes
    keep = decoder.kv[KV_HEADS]
    return replace(sizes, heads=keep * sizes.group_size, kv_heads=keep)


def _ffn(
    options: PruneOptions, decoder: Decoder, heads: Callable[[Layer], int], refuse: Complain, narrower: int
) -> Callable[[Layer], int] | None:
    """The width that keep_ffn, ffn or ratio give a layer, `narrower` multiples less; the full one when none of them is
    given."""
    sizes = decoder.sizes
    if options.keep_ffn is not None:
        stay = options.keep_ffn
        if stay > sizes.ffn:
            refuse("keep_ffn", f"{stay} neurons cannot stay: the model has {sizes.ffn}")
            return None
        return lambda layer: stay
    if options.ffn is not None:
        key, given, share = "ffn", options.ffn, options.ffn
    elif options.ratio is not None:
        rest = _rest(options.ratio, decoder, heads, refuse)
        if rest is None:
            return None
        key, given, share = "ratio", options.ratio, rest
    else:
        return whole_ffn
    multiple = width_multiple(sizes.hidden)

    def nearest(width: int) -> int:
        return (round((1 - share) * width / multiple) - narrower) * multiple

    width = nearest(sizes.ffn)
    if width >= sizes.ffn:
        keeps = decoder.keeps(heads, whole_ffn)
        if decoder.removed(keeps):
            return whole_ffn
        refuse(key, f"{given} removes nothing: FFN widths are multiples of {multiple} below {sizes.ffn}")
        return None
    gone = decoder.removed(decoder.keeps(heads, lambda layer: multiple)) / decoder.matrix_parameters
    # in narrow layers one multiple stays, whatever their share
    if width <= 0 or (options.ratio is not None and gone < (1 - WITHIN) * options.ratio):
        most = 1 - multiple / sizes.ffn if key == "ffn" else gone
        kept, of = (max(rule(layer) for layer in decoder.layers) for rule in (heads, whole_heads))
        with_them = f" and {kept} of {of} heads" if key == "ratio" and kept < of else ""
        fewest = f"{multiple} of {sizes.ffn} FFN neurons{with_them}, the fewest, make it {most:.4f}"
        refuse(key, f"{given} cannot be reached: {fewest}")
        return None
    return lambda layer: max(multiple, nearest(layer.sizes.ffn))


def _rest(ratio: float, decoder: Decoder, heads: Callable[[Layer], int], refuse: Complain) -> float | None:
    """The share of the FFN neurons of every layer that is not fixed which makes the ratio whole."""
    gone, whole = decoder.removed(decoder.keeps(heads, whole_ffn)), decoder.matrix_parameters
    rest = ratio * whole - gone
    if rest < 0:
        fewer = any(heads(layer) < own(layer, "heads") for layer in decoder.layers)
        pinned = any(kept < own(decoder.layers[index], name) for (index, name), kept in decoder.fixed.items())
        parts = {"layers": decoder.gone, "KV heads": decoder.kv, "heads": fewer, "pinned widths": pinned}
        what = f"{' and '.join(name for name, removes in parts.items() if removes)} alone remove"
        least = math.ceil(1e4 * gone / whole) / 1e4
        refuse("ratio", f"the {what} {least:.4f}; ratio must be at least that, found {ratio}")
        return None
    free = sum(own(layer, "ffn") * layer.weight("ffn") for layer in decoder.free("ffn"))
    multiple = width_multiple(decoder.sizes.hidden)
    fewest = decoder.removed(decoder.keeps(heads, lambda layer: multiple))
    if decoder.fixed and ratio * whole > fewest:
        found = math.floor(1e4 * fewest / whole) / 1e4
        refuse("ratio", f"{ratio} cannot be reached: all that protect and pin leave free makes {found:.4f}")
        return None
    return rest / free if free else 0.0


def _to_target(
    options: PruneOptions, decoder: Decoder, heads: Callable[[Layer], int], refuse: Complain, within: float
) -> tuple[Keeps, tuple[str, ...]] | None:
    """The widest FFN whose model stays within params or bytes, and a note with its neighbours."""
    sizes, key = decoder.sizes, "bytes" if options.params is None else "params"
    limit: int = getattr(options, key)
    multiple = width_multiple(sizes.hidden)
    widths = [*range(multiple, sizes.ffn, multiple), sizes.ffn]
    whole = all(heads(layer) == own(layer, "heads") for layer in decoder.layers)
    left = f"{heads(max(decoder.layers, key=whole_heads))} heads"
    left += f" in {len(decoder.layers)} layers" if decoder.gone else ""
    left += " and what is fixed by hand" if decoder.fixed else ""

    @cache
    def measured(width: int) -> tuple[int, int]:
        return decoder.measure(decoder.keeps(heads, lambda layer: width))

    def size(width: int) -> int:
        return measured(width)[TARGETS.index(key)]

    def told(width: int) -> str:
        parameters, nbytes = measured(width)
        return f"FFN {width}: {parameters:,} parameters" + (f", {nbytes:,} bytes" if key == "bytes" else "")

    at = bisect_right(widths, limit, key=size) - 1
    if at < 0:
        refuse(key, f"{limit:,} cannot be reached: the smallest that {left} leave is {told(widths[0])}")
        return None
    width = widths[at]
    keeps = decoder.keeps(heads, lambda layer: width)
    if not decoder.removed(keeps) and not decoder.beside:
        refuse(key, f"{limit:,} removes nothing: the model stays within it as it is ({told(width)})")
        return None
    around = [told(near) for near in (*widths[max(at - 1, 0) : at], *widths[at + 1 : at + 2])]
    if size(width) < (1 - within) * limit:
        above = f"; the next is {told(widths[at + 1])}" if at + 1 < len(widths) else ""
        refuse(
            key,
            f"{limit:,} is more than {within:.1%} away: the largest that {left} reach below it is {told(width)}{above}",
            f"keep_ffn: {width} (--keep-ffn {width}) takes the largest below it" if whole else None,
        )
        return None
    neighbours = f"; its neighbours are {' and '.join(around)}" if around else ""
    steps = f"in multiples of {multiple}" if width != sizes.ffn else "the full width"
    note = f"{key} {limit:,}: {told(width)}, the largest not above it, {steps}{neighbours}"
    return keeps, (note,)
