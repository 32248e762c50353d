"""Plan of the prune step: which widths stay, what every tensor becomes, who loads it, what it costs. From headers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import cast

from compress.arch import Family, family_of
from compress.arch.kv import KV_HEADS
from compress.checkpoint import per_layer
from compress.checkpoint.headers import Header
from compress.checkpoint.layout import files_bytes
from compress.curves import Curves
from compress.formats import PLAIN, is_quantized
from compress.steps.prune.after import cut, label_notes, labelled
from compress.steps.prune.ahead import ahead
from compress.steps.prune.allocate import MOST
from compress.steps.prune.budgets import Fixed, fixed_by_hand
from compress.steps.prune.choose import choose
from compress.steps.prune.decoder import Decoder, Keeps, by_layer, layers_of, own
from compress.steps.prune.enough import held_notes, refit_notes
from compress.steps.prune.measured import KEY, measured, measured_notes, predicted_loss
from compress.steps.prune.memory import layer_parameters, peak, tokens_of
from compress.steps.prune.options import PER_LAYER, PruneOptions
from compress.steps.prune.shares import weight_notes
from compress.steps.prune.tower import WHOLE_TOWER, TowerLeft, tower_left
from compress.steps.prune.whole import Left, layers_left
from compress.steps.types import Complain, PlanContext, StepPlan

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


@dataclass(frozen=True)
class _Decided:
    """What stays by the options. `seen`: the header without what goes of the vision tower; `notes`: how the widths were
    chosen."""

    left: Left
    decoder: Decoder
    keep: Keeps
    by_hand: Fixed
    tower: TowerLeft
    seen: Header
    curves: Curves | None
    notes: tuple[str, ...]

    @property
    def losing(self) -> frozenset[str]:
        """The groups that lose units in some layer."""
        return frozenset(
            name
            for layer, each in zip(self.left.layers, self.keep, strict=True)
            for name, group in layer.groups.items()
            if each[name] < group.units
        )


def plan(before: Header, options: PruneOptions, context: PlanContext, complain: Complain) -> PrunePlan | None:
    """Resolve the shares to widths; complain about what cannot be."""
    if is_quantized(before):
        complain("", "the model is already quantized; prune before quantizing")
        return None
    family = family_of(before)
    decided = _decided(before, family, options, context, complain)
    if decided is None:
        return None
    result = _result(before, family, decided, options, complain)
    if result is None:
        return None
    after, labels = result
    decoder, keep, tower, curves = decided.decoder, decided.keep, decided.tower, decided.curves
    losing, kv = decided.losing, bool(decided.left.kv)
    if options.joint_refit and (wrong := _no_joint(options, family, losing)) is not None:
        complain("joint_refit", wrong)
    if options.error_propagation and (wrong := _no_propagation(options, family, losing)) is not None:
        complain("error_propagation", wrong)
    share = decoder.removed(keep) / decoder.matrix_parameters
    parameters, nbytes = decoder.measure(keep)
    first = ahead(options, before, family, layer_parameters(before), losing, context, complain)
    sizes = family.sizes(before)
    return PrunePlan(
        kind="prune",
        options=options,
        before=before,
        after=after,
        parameters=parameters,
        nbytes=nbytes,
        memory=peak(sizes, options, context, before, len(keep), first, tower),
        # hidden states (the dense model's as well, where errors propagate), and the next before the last ones go
        scratch=max((4 if options.error_propagation else 2) * 4 * tokens_of(context) * sizes.hidden, first.scratch)
        + 2 * tower.held,
        notes=(
            _told(decided, before, share),
            *decided.by_hand.notes,
            *decided.notes,
            *_thin(decoder, keep),
            *decided.left.notes,
            *tower.notes,
            *labels,
            *first.notes,
            *refit_notes(options, decoder, keep, context, complain),
            *held_notes(options, losing, tower.ffn < tower.whole.ffn, complain),
            *weight_notes(options, context.data["calibration"], bool(losing - {KV_HEADS}), kv, complain),
            *([] if curves is None else measured_notes(curves, decoder, keep, options)),
        ),
        made_with={} if curves is None else {KEY: curves.digest},
        keep=keep,
        removed=share,
        measured=curves,
        predicted_loss=None if curves is None else predicted_loss(curves, decoder.layers, keep),
        tower=tower,
    )


def _decided(
    before: Header, family: Family, options: PruneOptions, context: PlanContext, complain: Complain
) -> _Decided | None:
    """What stays; None after a complaint."""
    whole = layers_of(before, family)
    left = layers_left(before, family, whole, options, complain)
    if left is None:
        return None
    layers = left.layers
    curves = None
    if options.from_sensitivity is not None:
        curves = measured(before, layers, len(layers) < len(whole) or bool(left.kv), options, complain)
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

    def measure(keep: Keeps) -> tuple[int, int]:
        narrow = cut(seen, family, layers, keep)
        return PLAIN.parameters(narrow, family), files_bytes(narrow.tensors.values(), context.shard_bytes)

    gone = sum(layer.matrix_parameters for layer in whole[len(layers) :])
    decoder = Decoder(layers, measure, by_hand.units, left.kv, gone, tower.gone(before))
    sizes = family.sizes(before)

    def loadable(heads: int) -> bool:
        fewer = replace(sizes, heads=heads)
        return heads == sizes.heads or family.label(before.config, fewer, options.flavour)[0] is not None

    resolved = choose(options, decoder, curves, loadable, complain)
    return None if resolved is None else _Decided(left, decoder, resolved[0], by_hand, tower, seen, curves, resolved[1])


def _result(
    before: Header, family: Family, decided: _Decided, options: PruneOptions, complain: Complain
) -> tuple[Header, list[str]] | None:
    """The header of the result, and under which label it stands; None after a complaint."""
    layers, keep = decided.left.layers, decided.keep
    label = labelled(family, before, layers, keep, options, complain)
    if label is None:
        return None
    rewrite, why = label
    narrow = cut(decided.seen, family, layers, keep)
    after = narrow.planned(per_layer.marked(rewrite.config(narrow.config)), narrow.tensors.values())
    differ = per_layer.is_per_layer(after.config)
    made = family if family.traced else family_of(after)  # a traced one is found by running it, and this may not run
    if differ and not made.layered:
        given = [key for key in ("pin", "protect") if getattr(options, key) is not None]
        given += ["allocation"] if options.allocation == PER_LAYER else []
        complain(given[0] if given else "", f"layers of a {made.name} cannot differ in width; {_NARROW}")
        return None
    return after, [*label_notes(family, after, why), *([*by_layer(keep), per_layer.NOTE] if differ else [])]


def _told(decided: _Decided, before: Header, share: float) -> str:
    """The share that goes, or that nothing does."""
    if decided.losing or decided.left.kv or decided.decoder.gone or decided.seen is not before:
        return f"{share:.2%} of the decoder layers' matrix parameters go"
    return NOTHING_BY_HAND if decided.by_hand.units else NOTHING


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


def _no_propagation(options: PruneOptions, family: Family, losing: Collection[str]) -> str | None:
    """What is wrong with error propagation."""
    if not options.refit:
        return "errors propagate into the refit, which refit: false leaves out"
    if "ffn" not in losing:
        return "no FFN neurons go, so there is no refit that errors could propagate into"
    if options.held_out is not None:
        return "not with held_out, whose windows choose a damping for the plain refit"
    if family.traced:
        return f"how a {family.name} adds what its FFN gives to the residual stream is not described"
    return None


def _no_joint(options: PruneOptions, family: Family, losing: Collection[str]) -> str | None:
    """What is wrong with a joint refit."""
    if not options.refit:
        return "a joint refit goes on from the refit, which refit: false leaves out"
    if "ffn" not in losing:
        return "no FFN neurons go, so there is nothing to refit jointly"
    if family.traced:
        return f"which matrices of a {family.name} are gate, up and down is not described; down alone is refitted"
    return None
