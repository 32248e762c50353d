"""How many units stay: shares, exact counts and size targets to widths, or one clear line why not. From headers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from compress.arch import Group, Sizes
from compress.steps.prune.options import PruneOptions
from compress.steps.types import Complain

WIDE = 2048  # hidden size from which FFN widths are multiples of 256 (GGUF K-quants, tensor parallelism, INT8 kernels)
WITHIN = 0.015  # a target is met when the largest reachable size is at most this share below it
SHARES = ("ratio", "ffn", "heads")
EXACT = ("keep_ffn", "keep_heads")
WHOLE = ("keep_layers",)  # counted beside the shares
TARGETS = ("params", "bytes")
WIDTHS = ("ratio", "ffn", "keep_ffn", *TARGETS)  # each says how wide the FFN becomes

Keep = Mapping[str, int]  # group -> units that stay in every layer


@dataclass(frozen=True)
class Decoder:
    """What is cut: its sizes, its groups by name, the shapes of one layer, how many layers stay, and `measure`: what
    would be left of the whole model, parameters and bytes of its weight files."""

    sizes: Sizes
    layers: int
    groups: Mapping[str, Group]
    shapes: Mapping[str, tuple[int, ...]]
    measure: Callable[[Keep], tuple[int, int]]

    @property
    def matrix_parameters(self) -> int:
        """Attention + FFN matrix parameters of one layer."""
        return sum(shape[0] * shape[1] for shape in self.shapes.values() if len(shape) == 2)

    def removed(self, keep: Keep) -> int:
        """Matrix parameters that go from one layer."""
        return sum((g.units - keep[name]) * g.parameters_per_unit(self.shapes) for name, g in self.groups.items())

    def share(self, keep: Keep) -> float:
        """Share of all decoder layers' matrix parameters that goes, with the layers that go."""
        stays = self.matrix_parameters - self.removed(keep)
        return 1 - self.layers * stays / (self.sizes.layers * self.matrix_parameters)


def width_multiple(hidden: int) -> int:
    """FFN widths that are not given exactly are multiples of this."""
    return 256 if hidden >= WIDE else 8


def resolve(options: PruneOptions, decoder: Decoder, complain: Complain) -> tuple[Keep, tuple[str, ...]] | None:
    """The units that stay, and how a width was chosen; None after a complaint."""
    given = [key for key in (*SHARES, *EXACT, *WHOLE, *TARGETS) if getattr(options, key) is not None]
    if not given:
        complain("", f"nothing to prune: give one of {', '.join((*SHARES, *EXACT, *WHOLE, *TARGETS))}")
        return None
    clash = _clash(given)
    if clash is not None:
        complain(*clash)
        return None
    heads = _heads(options, decoder.sizes, complain)
    if heads is None:
        return None
    if options.params is not None or options.bytes is not None:
        return _to_target(options, decoder, heads, complain)
    ffn = _ffn(options, decoder, heads, complain)
    if ffn is None:
        return None
    notes = []
    if options.keep_ffn is None and ffn != decoder.sizes.ffn:
        hidden = decoder.sizes.hidden
        notes.append(
            f"FFN width {ffn}: the nearest multiple of {width_multiple(hidden)}, because hidden size is {hidden}"
        )
    return {"heads": heads, "ffn": ffn}, tuple(notes)


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


def _heads(options: PruneOptions, sizes: Sizes, refuse: Complain) -> int | None:
    if options.keep_heads is not None:
        if options.keep_heads > sizes.heads or options.keep_heads % sizes.kv_heads:
            refuse(
                "keep_heads",
                f"{options.keep_heads} heads cannot stay: the model has {sizes.heads}, and every one of "
                f"{sizes.kv_heads} KV heads keeps equally many (a multiple of {sizes.kv_heads}, at most {sizes.heads})",
            )
            return None
        return options.keep_heads
    if options.heads is None:
        return sizes.heads
    gone = round(options.heads * sizes.group_size)
    if not 0 < gone < sizes.group_size:
        steps = [f"{n / sizes.group_size:.4f}" for n in range(1, sizes.group_size)]
        allowed = ", ".join(steps) if steps else "none: every KV head has one query head only"
        refuse(
            "heads",
            f"{options.heads} of {sizes.group_size} query heads per KV head rounds to {gone} of them; "
            f"the shares that can go are {allowed}",
        )
        return None
    return sizes.heads - gone * sizes.kv_heads


def _ffn(options: PruneOptions, decoder: Decoder, heads: int, refuse: Complain) -> int | None:
    """The width that keep_ffn, ffn or ratio give; the full one when none of them is given."""
    sizes, whole = decoder.sizes, decoder.matrix_parameters
    if options.keep_ffn is not None:
        if options.keep_ffn > sizes.ffn:
            refuse("keep_ffn", f"{options.keep_ffn} neurons cannot stay: the model has {sizes.ffn}")
            return None
        return options.keep_ffn
    if options.ffn is not None:
        wanted, key = (1 - options.ffn) * sizes.ffn, "ffn"
    elif options.ratio is not None:
        without = {"heads": heads, "ffn": sizes.ffn}
        share = decoder.share(without)
        rest = (options.ratio - share) * whole * sizes.layers / decoder.layers
        if rest < 0:
            gone = [
                name for name, left in (("heads", heads), ("layers", decoder.layers)) if left < getattr(sizes, name)
            ]
            alone = f"the {' and '.join(gone)} alone remove {share:.4f}"
            refuse("ratio", f"{alone}; ratio must be at least that, found {options.ratio}")
            return None
        wanted, key = sizes.ffn - rest / decoder.groups["ffn"].parameters_per_unit(decoder.shapes), "ratio"
    else:
        return sizes.ffn
    multiple, found = width_multiple(sizes.hidden), getattr(options, key)
    width = round(wanted / multiple) * multiple
    if width >= sizes.ffn:
        if heads < sizes.heads or decoder.layers < sizes.layers:
            return sizes.ffn
        refuse(key, f"{found} removes nothing: FFN widths are multiples of {multiple} below {sizes.ffn}")
        return None
    if width <= 0:
        refuse(key, f"{found} would leave no FFN neurons (of {sizes.ffn}, in multiples of {multiple})")
        return None
    return width


def _to_target(
    options: PruneOptions, decoder: Decoder, heads: int, refuse: Complain
) -> tuple[Keep, tuple[str, ...]] | None:
    """The widest FFN whose model stays within params or bytes, and a note with its neighbours."""
    sizes, key = decoder.sizes, "bytes" if options.params is None else "params"
    limit: int = getattr(options, key)
    multiple = width_multiple(sizes.hidden)
    widths = [*range(multiple, sizes.ffn, multiple), sizes.ffn]

    @cache
    def measured(width: int) -> tuple[int, int]:
        return decoder.measure({"heads": heads, "ffn": width})

    def size(width: int) -> int:
        return measured(width)[TARGETS.index(key)]

    def told(width: int) -> str:
        parameters, nbytes = measured(width)
        return f"FFN {width}: {parameters:,} parameters" + (f", {nbytes:,} bytes" if key == "bytes" else "")

    at = bisect_right(widths, limit, key=size) - 1
    left = f"{heads} heads" + (f" in {decoder.layers} layers" if decoder.layers < sizes.layers else "")
    if at < 0:
        refuse(key, f"{limit:,} cannot be reached: the smallest that {left} leave is {told(widths[0])}")
        return None
    width = widths[at]
    if width == sizes.ffn and heads == sizes.heads and decoder.layers == sizes.layers:
        refuse(key, f"{limit:,} removes nothing: the model stays within it as it is ({told(width)})")
        return None
    around = [told(near) for near in (*widths[max(at - 1, 0) : at], *widths[at + 1 : at + 2])]
    if size(width) < (1 - WITHIN) * limit:
        above = f"; the next is {told(widths[at + 1])}" if at + 1 < len(widths) else ""
        refuse(
            key,
            f"{limit:,} is more than {WITHIN:.1%} away: the largest that {left} reach below it is {told(width)}{above}",
        )
        return None
    neighbours = f"; its neighbours are {' and '.join(around)}" if around else ""
    steps = f"in multiples of {multiple}" if width != sizes.ffn else "the full width"
    note = f"{key} {limit:,}: {told(width)}, the largest not above it, {steps}{neighbours}"
    return {"heads": heads, "ffn": width}, (note,)
