"""Which units stay: by the rules of `widths`, or, where a sensitivity folder has measured cost curves, at least cost.

`uniform` takes the pair (heads, FFN width) of least predicted loss, `per-layer` the widths of every layer and group.
numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from compress.curves import Curves
from compress.steps.prune.allocate import MOST, allocate, choices, smallest, uncovered
from compress.steps.prune.decoder import Decoder, Keeps, Layer, whole_ffn, whole_heads, width_multiple
from compress.steps.prune.measured import predicted_loss
from compress.steps.prune.options import PER_LAYER, PruneOptions
from compress.steps.prune.widths import BUDGETS, WITHIN, follow, heads_rule, resolve
from compress.steps.types import Complain

Chosen = tuple[Keeps, tuple[str, ...]]


def choose(
    options: PruneOptions,
    decoder: Decoder,
    curves: Curves | None,
    loadable: Callable[[int], bool],
    complain: Complain,
) -> Chosen | None:
    """The units that stay in every layer, and how they were chosen; None after a complaint.

    loadable: whether some stock class takes so many query heads.
    """
    given = [key for key in BUDGETS if getattr(options, key) is not None]
    if options.allocation == PER_LAYER:
        wrong = _wrong(options, decoder, curves, given)
        if wrong is not None:
            complain("allocation", *wrong)
            return None
        if curves is not None:
            return _per_layer(options, decoder, curves, loadable, given[0], complain)
    shaped = any(getattr(options, key) is not None for key in ("heads", "keep_heads", "ffn", "keep_ffn"))
    if curves is not None and len(given) == 1 and not shaped and not decoder.gone and not decoder.kv:
        return _pair(options, decoder, curves, loadable, complain)
    return resolve(options, decoder, complain)


def _wrong(
    options: PruneOptions, decoder: Decoder, curves: Curves | None, given: list[str]
) -> tuple[str, str | None] | None:
    """Why layers cannot be given widths of their own, and what helps."""
    if decoder.gone or decoder.kv:
        return "per-layer does not go with keep_layers or keep_kv_heads: all layers are alike there", None
    if curves is None:
        if decoder.fixed:
            return None  # what protect and pin say is all that differs
        return (
            "per-layer needs measured cost curves",
            "autoglm-compress sensitivity MODEL -o DIR measures them; then from_sensitivity: DIR",
        )
    if options.heads is not None and options.keep_heads is not None:
        return "'keep_heads' (what stays) and 'heads' (share removed) exclude each other", None
    widths = [key for key in ("ffn", "keep_ffn") if getattr(options, key) is not None]
    if len(given) == 1 and not widths:
        return None
    found = " and ".join([*given, *widths]) or "none"
    return f"per-layer needs one budget for all layers: ratio, params or bytes; found {found}", None


def _pair(
    options: PruneOptions, decoder: Decoder, curves: Curves, loadable: Callable[[int], bool], complain: Complain
) -> Chosen | None:
    """The heads and the FFN width, alike in all layers that are not fixed, of least predicted loss in the budget: of
    all pairs that stay within it, once one of them is near it."""
    sizes, near = decoder.most_heads, False
    counts = [n for n in range(sizes.heads, 0, -sizes.kv_heads) if n >= (1 - MOST) * sizes.heads and loadable(n)]
    if not decoder.free("heads"):
        counts = counts[:1]
    found: list[tuple[float, int, Chosen]] = []
    # of pairs whose widths were rounded up, one would be best for removing less: the next narrower width stands for it
    least = (1 - WITHIN) * (options.ratio or 0) * decoder.matrix_parameters
    for heads in counts:
        chosen = follow(options, decoder, _so_many(heads), _silent, within=1.0)
        if chosen is not None and decoder.removed(chosen[0]) < least:
            chosen = follow(options, decoder, _so_many(heads), _silent, narrower=1)
        if chosen is not None and uncovered(chosen[0], decoder, curves.curves) is None:
            found.append((predicted_loss(curves, decoder.layers, chosen[0]), heads, chosen))
            near = near or follow(options, decoder, _so_many(heads), _silent) is not None
    if not near:
        return _beyond(options, decoder, counts, complain)
    loss, heads, (keeps, notes) = min(found, key=lambda pair: pair[0])
    others = [f"{count} heads {cost:.4f}" for cost, count, _ in found if count != heads]
    why = f"of {len(found)} counts the one of least predicted loss, {loss:.4f} ({', '.join(others)})"
    return keeps, (f"{heads} heads: {why if others else 'the only count that reaches it'}", *notes)


def _beyond(options: PruneOptions, decoder: Decoder, counts: list[int], complain: Complain) -> Chosen | None:
    """The pair of most heads that meets a budget which the curves do not reach; None after a complaint, where none
    does: a budget that is out of reach is told beside the one that the fewest heads make."""
    for heads in counts:
        if follow(options, decoder, _so_many(heads), _silent) is not None:
            return follow(options, decoder, _so_many(heads), complain)
    key = next(key for key in BUDGETS if getattr(options, key) is not None)
    size, limit, _ = _budget(options, decoder, key)
    narrowest = decoder.keeps(whole_heads, lambda layer: width_multiple(decoder.sizes.hidden))
    rule = _so_many(counts[-1]) if counts and size(narrowest) > limit else whole_heads
    return follow(options, decoder, rule, complain)


def _silent(key: str, message: str, hint: str | None = None) -> None:
    """What makes one pair impossible is no complaint: there are others."""


def _so_many(heads: int) -> Callable[[Layer], int]:
    return lambda layer: heads


def _per_layer(
    options: PruneOptions,
    decoder: Decoder,
    curves: Curves,
    loadable: Callable[[int], bool],
    key: str,
    complain: Complain,
) -> Chosen | None:
    """Widths of their own for every layer, of least predicted loss within the budget."""
    rule = heads_rule(options, decoder, complain)
    if rule is None:
        return None
    base = decoder.keeps(rule, whole_ffn)
    groups = ("ffn",) if options.heads is not None or options.keep_heads is not None else ("heads", "ffn")
    free = [(i, name) for i in range(len(base)) for name in groups if (i, name) not in decoder.fixed]
    counts = {n for n in range(1, decoder.most_heads.heads + 1) if n % decoder.most_heads.kv_heads == 0 and loadable(n)}
    may = choices(decoder, curves.curves, free, counts)
    size, limit, told = _budget(options, decoder, key)
    if size(base) <= limit:
        if decoder.beside:
            return base, (f"{key} {told(limit)}: {told(size(base))} reached by the cut of the vision tower alone",)
        by_hand = (
            f"{told(limit)}: what is given by hand alone makes it {told(size(base))}, and nothing is left to choose"
        )
        nothing = f"{told(limit)} removes nothing: the model stays within it as it is ({told(size(base))})"
        complain(key, by_hand if decoder.removed(base) else nothing)
        return None
    fewest = smallest(base, may)
    less = [whole - left for whole, left in zip(decoder.measure(base), decoder.measure(fewest), strict=True)]
    each = max(1, less[1] // less[0]) if key == "bytes" and less[0] else 1  # of what may go: dtypes may be mixed
    keeps = allocate(decoder, base, may, lambda found: -(-(size(found) - limit) // each))
    if keeps is None and size(fewest) <= limit:  # biases and file headers make up for what the matrices lack
        keeps = fewest
    if keeps is None:
        least = told(size(fewest))
        complain(
            key,
            f"{told(limit)} cannot be reached: at most {MOST:.0%} of a layer's units go, and no more than was "
            f"measured; the {'largest' if key == 'ratio' else 'smallest'} is {least}",
        )
        return None
    return keeps, (f"widths by layer, of least predicted loss within {key} {told(limit)}: {told(size(keeps))} reached",)


def _budget(
    options: PruneOptions, decoder: Decoder, key: str
) -> tuple[Callable[[Keeps], int], int, Callable[[int], str]]:
    """What is counted, how much of it may stay, and how a count is told."""
    if options.ratio is not None:
        whole = decoder.matrix_parameters
        return (
            lambda keeps: whole - decoder.removed(keeps),
            math.floor((1 - options.ratio) * whole),
            lambda left: f"{1 - left / whole:.4f}",
        )
    limit: int = getattr(options, key)
    return (lambda keeps: decoder.measure(keeps)[key == "bytes"]), limit, lambda left: f"{left:,} {_NOUN[key]}"


_NOUN = {"params": "parameters", "bytes": "bytes"}
