"""Plan of the prune step: which widths stay, what every tensor becomes, who loads it, what it costs. From headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compress.arch import SAME, Family, Group, Rewrite, Sizes, family_of
from compress.checkpoint.headers import Header, TensorSpec
from compress.checkpoint.layout import files_bytes
from compress.data import expected_tokens
from compress.formats import PLAIN, is_quantized
from compress.limits import BATCH_TOKENS, DOUBLE_UP_TO, VOCAB_BYTES
from compress.steps.prune.ahead import Ahead, ahead
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.widths import Decoder, Keep, resolve
from compress.steps.types import Complain, PlanContext, StepPlan


@dataclass(frozen=True, kw_only=True)
class PrunePlan(StepPlan):
    """`keep`: units that stay in every layer, by group name. `removed`: share of the decoder layers' attention + FFN
    matrix parameters that goes. The families of `before` and `after` may differ (Family.rewrites)."""

    keep: Keep
    removed: float


def plan(before: Header, options: PruneOptions, context: PlanContext, complain: Complain) -> PrunePlan | None:
    """Resolve the shares to widths; complain about what cannot be."""
    if is_quantized(before):
        complain("", "the model is already quantized; prune before quantizing")
        return None
    family = family_of(before)
    sizes = family.sizes(before)
    groups = {group.name: group for group in family.groups(sizes, before.text_config)}

    def measure(keep: Keep) -> tuple[int, int]:
        cut = _cut(before, family, groups, keep)
        return PLAIN.parameters(cut, family), files_bytes(cut.tensors.values(), context.shard_bytes)

    decoder = Decoder(sizes, groups, family.layer(sizes, before.text_config), measure)
    resolved = resolve(options, decoder, complain)
    if resolved is None:
        return None
    keep, chosen = resolved
    label = _label(family, before, replace(sizes, heads=keep["heads"], ffn=keep["ffn"]), options, complain)
    if label is None:
        return None
    rewrite, why = label
    cut = _cut(before, family, groups, keep)
    after = cut.planned(rewrite.config(cut.config), cut.tensors.values())
    share = decoder.removed(keep) / decoder.matrix_parameters
    parameters, nbytes = measure(keep)
    first = ahead(options, before, family, _layer_parameters(before), context)
    return PrunePlan(
        kind="prune",
        options=options,
        before=before,
        after=after,
        parameters=parameters,
        nbytes=nbytes,
        memory=_memory(sizes, context, before, first),
        # hidden states, and the next before the last ones go
        scratch=max(2 * 4 * _tokens(context) * sizes.hidden, first.scratch),
        notes=(
            f"{share:.2%} of the decoder layers' matrix parameters go",
            *chosen,
            *_label_notes(family, family_of(after), why),
            *first.notes,
            *_refit_note(options, sizes, keep, context),
        ),
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


def _label(
    family: Family, before: Header, sizes: Sizes, options: PruneOptions, complain: Complain
) -> tuple[Rewrite, str] | None:
    """The label under which `sizes` can be loaded, and why it is another one; None after a complaint."""
    if sizes.heads == family.sizes(before).heads:
        return SAME, ""
    rewrite, why = family.label(before.config, sizes, options.flavour)
    if rewrite is None:
        key = "heads" if options.heads is not None else "keep_heads"
        complain("flavour" if any(r.flavour for r in family.rewrites) else key, why)
        return None
    return rewrite, why


def _label_notes(before: Family, after: Family, why: str) -> list[str]:
    """Under which label the result stands and why, and who loads it, where that is not plain."""
    notes = [f"written as {after.model_type}, because {why}"] if why else []
    if after.rope != before.rope:
        notes.append(f"the rotary rows of every head in q_proj and k_proj go from {before.rope} to {after.rope}")
    if why or after.stock is not None:
        notes.append(f"loaded by {' and '.join(after.loaders)}")
    return notes


def _cut(before: Header, family: Family, groups: Mapping[str, Group], keep: Keep) -> Header:
    """The header with the kept units alone, under the label it has."""
    sizes = family.sizes(before)
    tensors = dict(before.tensors)
    for index in range(sizes.layers):
        prefix = family.prefix(index)
        for group in groups.values():
            for name in {cut.tensor for cut in group.cuts}:
                spec = tensors[prefix + name]
                shape = cut_shape(spec.shape, name, group, keep[group.name])
                tensors[prefix + name] = TensorSpec(spec.name, spec.dtype, shape)
    changes: dict[str, int] = {}
    if keep["ffn"] != sizes.ffn:
        changes["intermediate_size"] = keep["ffn"]
    if keep["heads"] != sizes.heads:
        # without explicit keys, stock code would derive another head_dim and KV count from fewer heads
        changes |= {
            "num_attention_heads": keep["heads"],
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
        }
    return before.planned(family.with_units(before.config, changes), tensors.values())


def _layer_parameters(before: Header) -> int:
    return sum(s.parameters for s in before.tensors.values() if s.name.startswith(family_of(before).prefix(0)))


def _memory(sizes: Sizes, context: PlanContext, before: Header, first: Ahead) -> int:
    """Peak bytes: hidden states, a layer before and after in float32, Grams, the solver's matrices, one batch; or what
    is done first."""
    data = context.data["calibration"]
    tokens = _tokens(context)
    layer = _layer_parameters(before)
    widest = max(sizes.ffn, sizes.heads * sizes.head_dim)
    gram = 4 * (sizes.ffn**2 + (sizes.heads * sizes.head_dim) ** 2)
    solver = 3 * widest**2 * (8 if widest <= DOUBLE_UP_TO else 4) + 4 * sizes.hidden * widest * 4
    batch = 4 * max(BATCH_TOKENS, data.length) * (4 * sizes.ffn + 6 * sizes.hidden)
    vocabulary = 2 * VOCAB_BYTES
    alive = max(4 * tokens * sizes.hidden + 10 * layer + gram + max(solver, batch, vocabulary), first.memory)
    # a quarter more for what the allocator cannot reuse; 128 MiB for stock classes and tokenizer, loaded on first use
    return alive + alive // 4 + 128 * 2**20


def _tokens(context: PlanContext) -> int:
    """Tokens of the calibration; an estimate where all of a text is taken."""
    return expected_tokens(context.data["calibration"], "calibration")


def _refit_note(options: PruneOptions, sizes: Sizes, keep: Keep, context: PlanContext) -> list[str]:
    data = context.data["calibration"]
    widest = max((n for n, kept in ((sizes.ffn, keep["ffn"]), (sizes.heads * sizes.head_dim, 0)) if kept != n))
    if not options.refit or data.samples is None:
        return []
    per_column = data.samples * data.length / widest
    note = f"refit: {per_column:.1f} calibration tokens per column"
    return [note + (" (under 4: the refit will be poor; give more samples)" if per_column < 4 else "")]
