"""Plan of the prune step: which widths stay, what every tensor becomes, who loads it, what it costs. From headers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import cast

from compress.arch import SAME, Family, Group, Rewrite, Sizes, family_of
from compress.arch.kv import KV_HEADS
from compress.checkpoint import per_layer
from compress.checkpoint.headers import Header, TensorSpec
from compress.checkpoint.layout import files_bytes
from compress.criteria import CRITERIA
from compress.curves import Curves
from compress.data import BUILTIN, expected_tokens
from compress.errors import UserError
from compress.formats import PLAIN, is_quantized
from compress.limits import BATCH_TOKENS, DEPTH_POSITIONS, DOUBLE_UP_TO, ENOUGH, JOINT_BYTES, VOCAB_BYTES
from compress.steps.prune.ahead import Ahead, ahead
from compress.steps.prune.allocate import MOST
from compress.steps.prune.budgets import fixed_by_hand
from compress.steps.prune.choose import BUDGETS, choose
from compress.steps.prune.enough import few_tokens, held_notes, windows_back
from compress.steps.prune.measured import KEY, measured, measured_notes, predicted_loss
from compress.steps.prune.options import PER_LAYER, PruneOptions
from compress.steps.prune.shares import weight_notes
from compress.steps.prune.tower import WHOLE_TOWER, TowerLeft, tower_left
from compress.steps.prune.whole import layers_left
from compress.steps.prune.widths import Decoder, Keeps, Layer, by_layer, own
from compress.steps.types import Complain, PlanContext, StepPlan

# benchmarks.md: SmolLM2 so calibrated stands at 2.47 times dense on WikiText-2, and at 1.93 with `self`
DOCUMENTATION = "calibrated on builtin, documentation of Python alone: text like the task's, or half self, keeps more"
_NARROW = "stock transformers was not shown to load such a checkpoint of it"

NOTHING = "nothing goes: the model has no more than that as it is"
NOTHING_BY_HAND = "nothing goes: what would is pinned or protected, or the model has no more than that as it is"


@dataclass(frozen=True, kw_only=True)
class PrunePlan(StepPlan):
    """`keep`: units that stay, by group name, layer by layer of those that stay. Which layers stay is found when the
    step runs, and until then `after` stands for any of them: where some go, all are alike. `removed`: share of the
    decoder layers' attention + FFN matrix parameters that goes. The families of `before` and `after` may differ
    (Family.rewrites). `measured`: where the ranking comes from, when a sensitivity folder is named; `predicted_loss`:
    what its curves say, nats a token. `tower`: what stays of the vision tower."""

    keep: Keeps
    removed: float
    measured: Curves | None = None
    predicted_loss: float | None = None
    tower: TowerLeft = WHOLE_TOWER

    @property
    def criterion(self) -> str:
        """By what the units are ranked: the option's, or that of the sensitivity folder."""
        return cast(PruneOptions, self.options).criterion if self.measured is None else self.measured.criterion

    @property
    def layers(self) -> int:
        """How many layers stay."""
        return len(self.keep)


def plan(before: Header, options: PruneOptions, context: PlanContext, complain: Complain) -> PrunePlan | None:
    """Resolve the shares to widths; complain about what cannot be."""
    if is_quantized(before):
        complain("", "the model is already quantized; prune before quantizing")
        return None
    family = family_of(before)
    whole = layers_of(before, family)
    left = layers_left(before, family, whole, options, complain)
    if left is None:
        return None
    layers, kv = left.layers, left.kv

    def measure(keep: Keeps) -> tuple[int, int]:
        cut = _cut(seen, family, layers, keep)
        return PLAIN.parameters(cut, family), files_bytes(cut.tensors.values(), context.shard_bytes)

    curves = None
    if options.from_sensitivity is not None:
        curves = measured(before, layers, len(layers) < len(whole) or bool(kv), options, complain)
        if curves is None:
            return None
    ranked = options.criterion if curves is None else curves.criterion
    tower = tower_left(before, family, options, ranked, context, complain)
    if tower is None:
        return None
    seen = tower.cut(before)
    by_hand = fixed_by_hand(options, layers, complain)
    if by_hand is None:
        return None
    gone = sum(layer.matrix_parameters for layer in whole[len(layers) :])
    decoder = Decoder(layers, measure, by_hand.units, kv, gone, tower.gone(before))
    sizes = family.sizes(before)

    def loadable(heads: int) -> bool:
        fewer = replace(sizes, heads=heads)
        return heads == sizes.heads or family.label(before.config, fewer, options.flavour)[0] is not None

    resolved = choose(options, decoder, curves, loadable, complain)
    if resolved is None:
        return None
    keep, chosen = resolved
    label = _label(family, before, layers, keep, options, complain)
    if label is None:
        return None
    rewrite, why = label
    cut = _cut(seen, family, layers, keep)
    after = cut.planned(per_layer.marked(rewrite.config(cut.config)), cut.tensors.values())
    made = family if family.traced else family_of(after)  # a traced one is found by running it, and this may not run
    if per_layer.is_per_layer(after.config) and not made.layered:
        given = [key for key in ("pin", "protect") if getattr(options, key) is not None]
        given += ["allocation"] if options.allocation == PER_LAYER else []
        complain(given[0] if given else "", f"layers of a {made.name} cannot differ in width; {_NARROW}")
        return None
    share = decoder.removed(keep) / decoder.matrix_parameters
    parameters, nbytes = measure(keep)
    losing = {
        name
        for layer, each in zip(layers, keep, strict=False)
        for name, group in layer.groups.items()
        if each[name] < group.units
    }
    if options.joint_refit and (wrong := _no_joint(options, family, losing)) is not None:
        complain("joint_refit", wrong)
    whole_model = not (losing or kv or decoder.gone) and seen is before
    told = f"{share:.2%} of the decoder layers' matrix parameters go"
    first = ahead(options, before, family, _layer_parameters(before), losing, context, complain)
    loss = None if curves is None else predicted_loss(curves, layers, keep)
    return PrunePlan(
        kind="prune",
        options=options,
        before=before,
        after=after,
        parameters=parameters,
        nbytes=nbytes,
        memory=_memory(sizes, options, context, before, len(layers), first, tower),
        # hidden states, and the next before the last ones go
        scratch=max(2 * 4 * _tokens(context) * sizes.hidden, first.scratch) + 2 * tower.held,
        notes=(
            told if not whole_model else NOTHING_BY_HAND if by_hand.units else NOTHING,
            *by_hand.notes,
            *chosen,
            *_thin(decoder, keep),
            *left.notes,
            *tower.notes,
            *_label_notes(family, after, why),
            *([*by_layer(keep), per_layer.NOTE] if per_layer.is_per_layer(after.config) else []),
            *first.notes,
            *_refit_note(options, decoder, keep, context, complain),
            *held_notes(options, losing, tower.ffn < tower.whole.ffn, complain),
            *weight_notes(options, context.data["calibration"], bool(losing - {KV_HEADS}), bool(kv), complain),
            *([] if curves is None else measured_notes(curves, decoder, keep, options)),
        ),
        made_with={} if curves is None else {KEY: curves.digest},
        keep=keep,
        removed=share,
        measured=curves,
        predicted_loss=loss,
        tower=tower,
    )


def _thin(decoder: Decoder, keep: Keeps) -> list[str]:
    """Where what is fixed by hand leaves so little of another layer that no allocation would cut it as far."""
    widths = [
        (each["ffn"] / own(layer, "ffn"), index)
        for index, (layer, each) in enumerate(zip(decoder.layers, keep, strict=True))
        if (index, "ffn") not in decoder.fixed
    ]
    if not (decoder.fixed and widths) or (least := min(widths))[0] >= 1 - MOST:
        return []
    left, whole = keep[least[1]]["ffn"], own(decoder.layers[least[1]], "ffn")
    return [f"what is fixed by hand leaves {left:,} of {whole:,} FFN neurons to layer {least[1]}: expect a poor result"]


def _no_joint(options: PruneOptions, family: Family, losing: Collection[str]) -> str | None:
    """What is wrong with a joint refit."""
    if not options.refit:
        return "a joint refit goes on from the refit, which refit: false leaves out"
    if "ffn" not in losing:
        return "no FFN neurons go, so there is nothing to refit jointly"
    if family.traced:
        return f"which matrices of a {family.name} are gate, up and down is not described; down alone is refitted"
    return None


def cut_shape(shape: tuple[int, ...], name: str, group: Group, keep: int) -> tuple[int, ...]:
    """The shape of one layer tensor after `group` keeps `keep` units."""
    new = list(shape)
    for cut in group.cuts:
        if cut.tensor == name:
            new[cut.axis] -= (group.units - keep) * cut.width
    return tuple(new)


def layers_of(header: Header, family: Family) -> tuple[Layer, ...]:
    """What can be cut in every layer; layers of the same sizes are one object."""
    config, sizes = header.text_config, family.layers(header)
    made = {
        own: Layer(own, {group.name: group for group in family.groups(own, config)}, family.layer(own, config))
        for own in set(sizes)
    }
    return tuple(made[own] for own in sizes)


def _label(
    family: Family,
    before: Header,
    layers: Sequence[Layer],
    keep: Keeps,
    options: PruneOptions,
    complain: Complain,
) -> tuple[Rewrite, str] | None:
    """The label under which every layer can be loaded, and why it is another one; None after a complaint."""
    found = SAME, ""
    seen = {
        replace(layer.sizes, heads=each["heads"], kv_heads=each.get(KV_HEADS, layer.sizes.kv_heads)): layer.sizes
        for layer, each in zip(layers, keep, strict=True)
    }
    for sizes, whole in seen.items():
        if (sizes.heads, sizes.kv_heads) == (whole.heads, whole.kv_heads):
            continue
        rewrite, why = family.label(before.config, sizes, options.flavour)
        if rewrite is None:
            keys = ("heads", "keep_heads", "keep_kv_heads", "kv_cache_bytes", "pin", *BUDGETS)
            key = next((key for key in keys if getattr(options, key) is not None), "keep_heads")
            complain("flavour" if any(r.flavour for r in family.rewrites) else key, why)
            return None
        if rewrite is not SAME:
            found = rewrite, why
    return found


def _label_notes(before: Family, result: Header, why: str) -> list[str]:
    """Under which label the result stands and why, and who loads it, where that is not plain."""
    after = family_of(result)
    notes = [f"written as {after.model_type}, because {why}"] if why else []
    if after.rope != before.rope:
        notes.append(f"the rotary rows of every head in q_proj and k_proj go from {before.rope} to {after.rope}")
    if why or after.stock is not None:
        notes.append(f"loaded by {' and '.join(after.loaders_of(result.config))}")
    return notes


def _cut(before: Header, family: Family, layers: Sequence[Layer], keep: Keeps) -> Header:
    """The header with the kept units alone, under the label it has."""
    sizes = family.sizes(before)
    gone = tuple(family.prefix(index) for index in range(len(layers), sizes.layers))
    tensors = {name: spec for name, spec in before.tensors.items() if not name.startswith(gone)}
    for index, (layer, each) in enumerate(zip(layers, keep, strict=True)):
        prefix = family.prefix(index)
        for group in layer.groups.values():
            for name in {cut.tensor for cut in group.cuts}:
                spec = tensors[prefix + name]
                shape = cut_shape(spec.shape, name, group, each[group.name])
                tensors[prefix + name] = TensorSpec(spec.name, spec.dtype, shape)
    changes, kv = {}, keep[0].get(KV_HEADS, sizes.kv_heads)
    fewer = any(each["heads"] < own(layer, "heads") for layer, each in zip(layers, keep, strict=True))
    if fewer or kv < sizes.kv_heads:
        # without explicit keys, stock code would derive another head_dim and KV count from fewer heads
        changes = {"num_key_value_heads": kv, "head_dim": sizes.head_dim}
    config = family.shallow(before, range(len(layers))) if gone else before.config
    told = [family.named(own) for own in _told_layers(before, sizes, keep, bool(changes))]
    text = per_layer.with_layers(per_layer.text_of(config), told)
    return before.planned(family.with_text(config, {**text, **family.named(changes)}), tensors.values())


def _told_layers(before: Header, sizes: Sizes, keep: Keeps, fewer_heads: bool) -> list[dict[str, int]]:
    """What config.json says of each layer; keys about which it has nothing new to say are left as they are."""
    differ = per_layer.is_per_layer(before.config)
    narrower = differ or any(each["ffn"] != sizes.ffn for each in keep)
    keys = {per_layer.FFN: "ffn"} if narrower else {}
    keys |= {per_layer.HEADS: "heads"} if differ or fewer_heads else {}
    return [{key: each[group] for key, group in keys.items()} for each in keep]


def _layer_parameters(before: Header) -> int:
    """Parameters of the largest layer."""
    family = family_of(before)
    prefix = family.prefix(family.widest(before))
    return sum(s.parameters for s in before.tensors.values() if s.name.startswith(prefix))


def _memory(
    sizes: Sizes,
    options: PruneOptions,
    context: PlanContext,
    before: Header,
    layers: int,
    first: Ahead,
    tower: TowerLeft,
) -> int:
    """Peak bytes: hidden states, a layer before and after in float32, Grams, the solver's matrices, one batch; what
    merging KV heads takes of the layer's input; what the choice of layers holds of their inputs; what was made of the
    vision tower. Or what is done `first`, that one among it."""
    data = context.data["calibration"]
    tokens = _tokens(context)
    layer = _layer_parameters(before)
    widest = max(sizes.ffn, sizes.heads * sizes.head_dim)
    # with windows held out every reader has a second Gram matrix
    gram = 4 * (sizes.ffn**2 + (sizes.heads * sizes.head_dim) ** 2) * (1 if options.held_out is None else 2)
    # of an elimination the inverse and two copies; the weights, and what the others have taken over, twice each
    solver = (3 * widest**2 + 4 * sizes.hidden * widest) * (8 if widest <= DOUBLE_UP_TO else 4)
    batch = 4 * max(BATCH_TOKENS, data.length) * (4 * sizes.ffn + 6 * sizes.hidden)
    vocabulary = 2 * VOCAB_BYTES
    merging = 4 * (sizes.hidden + 1) * (sizes.hidden + 1 + 2 * sizes.heads * sizes.head_dim)
    depth = 4 * (sizes.layers - layers + 1) * DEPTH_POSITIONS * sizes.hidden if layers < sizes.layers else 0
    seen, joint = (2 * 4 * tokens * sizes.hidden, _joint(sizes, tokens)) if options.joint_refit else (0, 0)
    work = max(solver, batch + joint, vocabulary, merging, depth)
    alive = 4 * tokens * sizes.hidden + 10 * layer + gram + seen + work
    alive = max(max(alive, first.memory) + tower.held, tower.memory)
    # a quarter more for what the allocator cannot reuse; 128 MiB for stock classes and tokenizer, loaded on first use
    return alive + alive // 4 + 128 * 2**20


def _joint(sizes: Sizes, tokens: int) -> int:
    """Bytes of a joint refit beside what the FFN reads and gives: gate, up and down nine times over (beginning, step,
    residual, direction, product), the kept Gram matrix and its factor, and what is kept of the FFN's inside."""
    factor = (8 if sizes.ffn <= DOUBLE_UP_TO else 4) * sizes.ffn**2
    inside = min(3 * 4 * tokens * sizes.ffn, JOINT_BYTES)
    return 9 * 4 * 3 * sizes.ffn * sizes.hidden + 4 * sizes.ffn**2 + factor + inside


def _tokens(context: PlanContext) -> int:
    """Tokens of the calibration; an estimate where all of a text is taken."""
    return expected_tokens(context.data["calibration"], "calibration")


def _refit_note(
    options: PruneOptions, decoder: Decoder, keep: Keeps, context: PlanContext, complain: Complain
) -> list[str]:
    """How many calibration tokens there are for every column of the widest Gram matrix (T/n); a complaint under 1."""
    data = context.data["calibration"]
    refitted = [
        layer.sizes.ffn for layer, each in zip(decoder.layers, keep, strict=True) if each["ffn"] < own(layer, "ffn")
    ]
    heads = any(each["heads"] < own(layer, "heads") for layer, each in zip(decoder.layers, keep, strict=True))
    merged = bool(decoder.kv) and options.refit
    if not (refitted or heads or merged):
        return []
    read = decoder.most_heads.heads * decoder.most_heads.head_dim if heads or merged else 0  # by o_proj
    widest = max([*refitted, read])
    if not options.refit and (options.from_sensitivity is not None or "gram" not in CRITERIA[options.criterion].needs):
        return []
    if data.samples is None:
        return []
    try:
        windows_back(options, data.samples)
    except UserError as problem:
        complain("held_out", problem.message, problem.hint)
    tokens = data.samples * data.length
    if not options.force and (few := few_tokens(tokens, widest)) is not None:
        complain("", few.message, few.hint)
    what = "refit" if options.refit else "ranking"
    note = f"{what}: {tokens / widest:.1f} calibration tokens per column"
    note += f" (under {ENOUGH}: the {what} will be poor; give more samples)" if tokens < ENOUGH * widest else ""
    return [note, *([DOCUMENTATION] if data.source == BUILTIN else [])]
