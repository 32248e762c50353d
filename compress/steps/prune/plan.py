"""Plan of the prune step: which widths stay, what every tensor becomes, what it costs. From headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compress.arch import Group, Sizes, family_of
from compress.checkpoint.headers import Header, TensorSpec
from compress.checkpoint.layout import files_bytes
from compress.data import BYTES_A_TOKEN, most_tokens
from compress.formats import PLAIN, is_quantized
from compress.steps.prune.options import PruneOptions
from compress.steps.types import Complain, PlanContext, StepPlan

WIDE = 2048  # hidden size from which FFN widths are multiples of 256 (GGUF K-quants, tensor parallelism, INT8 kernels)


@dataclass(frozen=True, kw_only=True)
class PrunePlan(StepPlan):
    """`keep`: units that stay in every layer, by group name. `removed`: share of the decoder layers' attention + FFN
    matrix parameters that goes."""

    keep: Mapping[str, int]
    removed: float


def plan(before: Header, options: PruneOptions, context: PlanContext, complain: Complain) -> PrunePlan | None:
    """Resolve the shares to widths; complain about what cannot be."""
    if is_quantized(before):
        complain("", "the model is already quantized; prune before quantizing")
        return None
    family = family_of(before)
    sizes = family.sizes(before)
    groups = {group.name: group for group in family.groups(sizes, before.text_config)}
    shapes = family.layer(sizes, before.text_config)
    keep = _resolve(options, sizes, groups, shapes, complain)
    if keep is None:
        return None
    new_sizes = replace(sizes, heads=keep["heads"], ffn=keep["ffn"])
    reason = family.refuse(new_sizes)
    if reason is not None:
        complain("heads" if options.heads is not None else "keep_heads", reason)
        return None
    removed = sum((g.units - keep[g.name]) * g.parameters_per_unit(shapes) for g in groups.values())
    share = removed / _matrix_parameters(shapes)
    after = _after(before, context, groups, keep, new_sizes)
    return PrunePlan(
        kind="prune",
        options=options,
        before=before,
        after=after,
        parameters=PLAIN.parameters(after, family),
        nbytes=files_bytes(after.tensors.values(), context.shard_bytes),
        memory=_memory(sizes, keep, context, before),
        notes=(f"{share:.2%} of the decoder layers' matrix parameters go", *_notes(options, sizes, keep, context)),
        keep=keep,
        removed=share,
    )


def cut_shape(shape: tuple[int, ...], name: str, group: Group, keep: int) -> tuple[int, ...]:
    """The shape of one layer tensor after `group` keeps `keep` units."""
    new = list(shape)
    for cut in group.cuts:
        if cut.tensor == name:
            new[cut.axis] -= (group.units - keep) * cut.width
    return tuple(new)


def _resolve(
    options: PruneOptions,
    sizes: Sizes,
    groups: Mapping[str, Group],
    shapes: Mapping[str, tuple[int, ...]],
    refuse: Complain,
) -> dict[str, int] | None:
    shares = [k for k in ("ratio", "ffn", "heads") if getattr(options, k) is not None]
    exact = [k for k in ("keep_ffn", "keep_heads") if getattr(options, k) is not None]
    if not shares and not exact:
        refuse("", "nothing to prune: give ratio, ffn, heads, keep_ffn or keep_heads")
        return None
    if shares and exact:
        refuse(exact[0], f"'{exact[0]}' (what stays) and '{shares[0]}' (share removed) exclude each other")
        return None
    if options.ratio is not None and options.ffn is not None:
        refuse("ffn", "'ratio' and 'ffn' exclude each other: with ratio the FFN takes what the heads leave")
        return None
    heads = _heads(options, sizes, refuse)
    if heads is None:
        return None
    ffn = _ffn(options, sizes, heads, groups, shapes, refuse)
    return None if ffn is None else {"heads": heads, "ffn": ffn}


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


def _ffn(
    options: PruneOptions,
    sizes: Sizes,
    heads: int,
    groups: Mapping[str, Group],
    shapes: Mapping[str, tuple[int, ...]],
    refuse: Complain,
) -> int | None:
    if options.keep_ffn is not None:
        if options.keep_ffn > sizes.ffn:
            refuse("keep_ffn", f"{options.keep_ffn} neurons cannot stay: the model has {sizes.ffn}")
            return None
        return options.keep_ffn
    if options.ffn is not None:
        wanted, key = (1 - options.ffn) * sizes.ffn, "ffn"
    elif options.ratio is not None:
        by_heads = (sizes.heads - heads) * groups["heads"].parameters_per_unit(shapes)
        rest = options.ratio * _matrix_parameters(shapes) - by_heads
        if rest < 0:
            share = by_heads / _matrix_parameters(shapes)
            refuse("ratio", f"the heads alone remove {share:.4f}; ratio must be at least that, found {options.ratio}")
            return None
        wanted, key = sizes.ffn - rest / groups["ffn"].parameters_per_unit(shapes), "ratio"
    else:
        return sizes.ffn
    multiple = width_multiple(sizes.hidden)
    width = round(wanted / multiple) * multiple
    if width >= sizes.ffn:
        if heads < sizes.heads:
            return sizes.ffn
        refuse(
            key, f"{getattr(options, key)} removes nothing: FFN widths are multiples of {multiple} below {sizes.ffn}"
        )
        return None
    if width <= 0:
        refuse(key, f"{getattr(options, key)} would leave no FFN neurons (of {sizes.ffn}, in multiples of {multiple})")
        return None
    return width


def width_multiple(hidden: int) -> int:
    """FFN widths are rounded to this."""
    return 256 if hidden >= WIDE else 8


def _matrix_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(shape[0] * shape[1] for shape in shapes.values() if len(shape) == 2)


def _after(
    before: Header, context: PlanContext, groups: Mapping[str, Group], keep: Mapping[str, int], sizes: Sizes
) -> Header:
    family = family_of(before)
    tensors = dict(before.tensors)
    for index in range(sizes.layers):
        prefix = family.prefix(index)
        for group in groups.values():
            for name in {cut.tensor for cut in group.cuts}:
                spec = tensors[prefix + name]
                shape = cut_shape(spec.shape, name, group, keep[group.name])
                tensors[prefix + name] = TensorSpec(spec.name, spec.dtype, shape)
    changes: dict[str, int] = {}
    if keep["ffn"] != groups["ffn"].units:
        changes["intermediate_size"] = keep["ffn"]
    if keep["heads"] != groups["heads"].units:
        # without explicit keys, stock code would derive another head_dim and KV count from fewer heads
        changes |= {
            "num_attention_heads": keep["heads"],
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
        }
    return before.planned(family.with_units(before.config, changes), tensors.values())


def _memory(sizes: Sizes, keep: Mapping[str, int], context: PlanContext, before: Header) -> int:
    """Peak bytes: hidden states, a layer before and after in float32, Grams, the solver's matrices, one batch."""
    data = context.data["calibration"]
    tokens = most_tokens(data, "calibration") // BYTES_A_TOKEN if data.samples is None else data.samples * data.length
    layer = sum(s.parameters for s in before.tensors.values() if s.name.startswith(family_of(before).prefix(0)))
    widest = max(sizes.ffn, sizes.heads * sizes.head_dim)
    gram = 4 * (sizes.ffn**2 + (sizes.heads * sizes.head_dim) ** 2)
    solver = 3 * widest**2 * (8 if widest <= 4096 else 4) + 4 * sizes.hidden * widest * 4
    batch = 4 * max(2048, data.length) * (4 * sizes.ffn + 6 * sizes.hidden)
    vocabulary = 16384 * sizes.hidden * 8
    alive = 4 * tokens * sizes.hidden + 10 * layer + gram + max(solver, batch, vocabulary)
    # a quarter more for what the allocator cannot reuse; 128 MiB for stock classes and tokenizer, loaded on first use
    return alive + alive // 4 + 128 * 2**20


def _notes(options: PruneOptions, sizes: Sizes, keep: Mapping[str, int], context: PlanContext) -> list[str]:
    notes = []
    if options.keep_ffn is None and keep["ffn"] != sizes.ffn:
        multiple = width_multiple(sizes.hidden)
        notes.append(
            f"FFN width {keep['ffn']}: the nearest multiple of {multiple}, because hidden size is {sizes.hidden}"
        )
    data = context.data["calibration"]
    if options.refit and data.samples is not None:
        widest = max(n for n, kept in ((sizes.ffn, keep["ffn"]), (sizes.heads * sizes.head_dim, 0)) if kept != n)
        per_column = data.samples * data.length / widest
        note = f"refit: {per_column:.1f} calibration tokens per column"
        notes.append(note + (" (under 4: the refit will be poor; give more samples)" if per_column < 4 else ""))
    return notes
