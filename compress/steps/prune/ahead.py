"""What is done with the whole model before the first layer is cut, as a plan tells it: the choice of layers by loss,
the backward pass of criteria that need gradients, images through the vision tower. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from compress.arch import Family, Sizes
from compress.arch.kv import KV_HEADS
from compress.arch.layer import QKV_FUSED
from compress.checkpoint.headers import Header
from compress.criteria import CRITERIA
from compress.data import DataSpec, expected_tokens, pictures_of
from compress.errors import MachineError, UserError, size
from compress.limits import BATCH_TOKENS, HEAD_TOKENS, TAPE_BYTES, VOCAB_BYTES, vocab_rows
from compress.steps.prune.options import PruneOptions
from compress.steps.types import Complain, PlanContext
from compress.stream import GRADIENTS, WHOLE

PATCHES_A_TOKEN, PATCH_BYTES = 4, 4 * 16 * 2048  # of an image; what the tower holds of a patch at once, generously


@dataclass(frozen=True)
class Ahead:
    """Bytes of memory at its peak, before any allowance, and of disk; and what it is, in words."""

    memory: int = 0
    scratch: int = 0
    notes: tuple[str, ...] = ()


def ahead(
    options: PruneOptions,
    before: Header,
    family: Family,
    layer: int,
    cut: Collection[str],
    context: PlanContext,
    complain: Complain,
) -> Ahead:
    """What `options.layer_criterion`, `options.criterion` and the images of the calibration take first, one after the
    other. `layer`: parameters of the largest layer; `cut`: groups that lose units."""
    depth = _depth(options, family.sizes(before), before.text_config, layer, context.data["calibration"])
    ranks = _criterion(options, before, family, layer, cut, context, complain)
    shown = _images(options, before, family, context.data["calibration"], complain)
    memory = max(depth.memory, ranks.memory, shown.memory)
    return Ahead(memory, ranks.scratch, depth.notes + ranks.notes + shown.notes)


def _depth(options: PruneOptions, sizes: Sizes, config: Mapping[str, Any], layer: int, data: DataSpec) -> Ahead:
    """What the choice of layers by loss takes: hidden states of the model and of it without each layer, one layer, one
    batch. By the other criteria, less than the pass that follows."""
    fewer = options.keep_layers is not None and options.keep_layers < sizes.layers
    if not fewer or options.layer_criterion != "loss":
        return Ahead()
    windows = min(options.layer_samples, max(1, expected_tokens(data, "calibration") // data.length))
    states = 4 * (sizes.layers + 1) * windows * data.length * sizes.hidden
    batch = batch_memory(sizes, config, data.length)
    logits = 2 * 4 * HEAD_TOKENS * sizes.vocab + 2 * VOCAB_BYTES  # and their softmax
    tokens = f"{windows} x {data.length} tokens (layer_samples)"
    note = f"layer_criterion loss: the model without each of {sizes.layers} layers on {tokens}: as much work as "
    note += f"{(sizes.layers + 1) / 2:g} forward passes over them, and {size(states)} of hidden states"
    return Ahead(states + 4 * layer + max(batch, logits), 0, (note,))


def _images(options: PruneOptions, before: Header, family: Family, data: DataSpec, complain: Complain) -> Ahead:
    """What showing images takes, if there are any."""
    try:
        images = pictures_of(data)
    except (UserError, MachineError):
        return Ahead()  # what is wrong with the data is told where data are checked
    if not images or family.vision is None:
        return Ahead()
    if CRITERIA[options.criterion].needs & WHOLE and options.from_sensitivity is None:
        complain("criterion", f"{options.criterion} takes text alone, and the calibration data have images")
    note = f"images in the calibration data: {len(images)}; windows of them are filled up with padding of no weight"
    return Ahead(sight_memory(before, family, data), 0, (note,))


def sight_memory(before: Header, family: Family, data: DataSpec) -> int:
    """Bytes that showing images takes at its peak, if there are any: the vision tower in float32, one image in it, all
    hidden states."""
    if family.vision is None or not pictures_of(data):
        return 0
    tower = sum(spec.parameters for name, spec in before.tensors.items() if name.startswith(f"{family.vision}."))
    image = PATCHES_A_TOKEN * data.length * PATCH_BYTES
    return 4 * tower + image + 4 * expected_tokens(data, "calibration") * family.sizes(before).hidden


def _criterion(
    options: PruneOptions,
    before: Header,
    family: Family,
    layer: int,
    cut: Collection[str],
    context: PlanContext,
    complain: Complain,
) -> Ahead:
    needs = CRITERIA[options.criterion].needs
    if options.from_sensitivity is not None or not set(cut) - {KV_HEADS}:  # merged KV heads are not ranked
        return Ahead()
    if needs & WHOLE:
        return _whole(options, before, family, cut, context, complain)
    if not needs & GRADIENTS:
        return Ahead()
    if (beside := family.head_beside(before.text_config)) is not None:
        complain("criterion", f"{options.criterion} needs the gradient of the loss, which knows none of this: {beside}")
    data, sizes = context.data["calibration"], family.sizes(before)
    windows = min(options.gradient_samples, max(1, expected_tokens(data, "calibration") // data.length))
    tokens = windows * data.length
    tape = 4 * sizes.layers * tokens * sizes.hidden
    inside, outside = (tape, 0) if tape <= TAPE_BYTES else (0, tape)
    weights = (12 if "taylor" in needs else 4) * layer  # as they are; the sum of their gradients, and those of a batch
    alive = (
        inside
        + 4 * tokens * sizes.hidden
        + max(weights + _graph(sizes, before.text_config, data.length), _head(sizes, data.length))
    )
    where = f"; its layers' inputs lie on the disk meanwhile ({size(outside)})" if outside else ""
    note = f"{options.criterion}: first a backward pass of the dense model, {windows} x {data.length} tokens{where}"
    return Ahead(alive, outside, (note,))


def _whole(
    options: PruneOptions,
    before: Header,
    family: Family,
    cut: Collection[str],
    context: PlanContext,
    complain: Complain,
) -> Ahead:
    """The stock model in float32, with gradients where the criterion takes them, and one window's graph of it all."""
    config, sizes, data = before.text_config, family.sizes(before), context.data["calibration"]
    reasons = {
        "stock transformers does not load it": family.stock is not None,
        "heads whose q, k and v are one matrix": "heads" in cut
        and f"{QKV_FUSED}.weight" in family.layer(sizes, config),
        "heads with rotary embeddings of several axes": "heads" in cut and family.text != "model",
        "heads with a KV head each": "heads" in cut and sizes.group_size == 1,
    }
    wrong = ", ".join(reason for reason, holds in reasons.items() if holds)
    if wrong:
        complain("criterion", f"Torch-Pruning's graph is of no use for this {family.name}: {wrong}")
    slopes = options.criterion == "tp-taylor"
    parameters = sum(spec.parameters for spec in before.tensors.values())
    attention = 3 * sizes.heads * data.length**2
    layer = attention + data.length * (8 * sizes.ffn + 10 * sizes.heads * sizes.head_dim + 16 * sizes.hidden)
    window = 4 * (sizes.layers * layer + 4 * data.length * sizes.vocab) if slopes else 0
    note = f"{options.criterion}: first the whole stock model is held in float32{', with its gradients' * slopes}"
    return Ahead((8 if slopes else 4) * parameters + window, 0, (note,))


def batch_memory(sizes: Sizes, config: Mapping[str, Any], length: int) -> int:
    """Bytes of one batch in a layer, from the text config: its states, the FFN's inside, and what grows with the square
    of the length."""
    return 4 * max(BATCH_TOKENS, length) * (4 * sizes.ffn + 6 * sizes.hidden) + _pairs(sizes, config, length)


def _pairs(sizes: Sizes, config: Mapping[str, Any], length: int) -> int:
    """Bytes of one batch that pairs of tokens take: none where attention runs in one kernel and is causal; a mask where
    layers see a window, which the kernel makes floats of; all scores, three times over, where it caps them."""
    each = 0
    if "sliding_attention" in (config.get("layer_types") or ()) or config.get("sliding_window"):
        each += 6
    if config.get("attn_logit_softcapping") is not None:
        each += 3 * 4 * sizes.heads
    return each * max(1, BATCH_TOKENS // length) * length**2


def _graph(sizes: Sizes, config: Mapping[str, Any], length: int) -> int:
    """Bytes of what one batch leaves behind in a layer, for its backward pass, and of the gradients there."""
    queries = sizes.heads * sizes.head_dim
    inside = 4 * max(BATCH_TOKENS, length) * (8 * sizes.ffn + 10 * queries + 16 * sizes.hidden)
    return inside + _pairs(sizes, config, length)


def _head(sizes: Sizes, length: int) -> int:
    """Bytes of one batch at the output matrix: logits of a block of the vocabulary, and mean rows."""
    rows = min(vocab_rows(sizes.hidden), sizes.vocab)
    return 4 * max(BATCH_TOKENS, length) * (3 * rows + 10 * sizes.hidden) + 2 * VOCAB_BYTES
