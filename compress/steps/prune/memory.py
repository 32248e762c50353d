"""The most memory that the step takes at a time, by what is alive then. From headers, torch-free."""

from __future__ import annotations

from compress.arch import Sizes, family_of
from compress.checkpoint.headers import Header
from compress.data import expected_tokens
from compress.limits import DEPTH_POSITIONS, DOUBLE_UP_TO, JOINT_BYTES, VOCAB_BYTES
from compress.steps.prune.ahead import Ahead, batch_memory
from compress.steps.prune.options import ALIGNED, PruneOptions
from compress.steps.prune.tower import TowerLeft
from compress.steps.types import PlanContext


def peak(
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
    tokens = tokens_of(context)
    layer = layer_parameters(before)
    widest = max(sizes.ffn, sizes.heads * sizes.head_dim)
    # with windows held out every reader has a second Gram matrix
    gram = 4 * (sizes.ffn**2 + (sizes.heads * sizes.head_dim) ** 2) * (1 if options.held_out is None else 2)
    # of an elimination the inverse and two copies; the weights, and what the others have taken over, twice each
    solver = (3 * widest**2 + 4 * sizes.hidden * widest) * (8 if widest <= DOUBLE_UP_TO else 4)
    batch = batch_memory(sizes, before.text_config, data.length)
    vocabulary = 2 * VOCAB_BYTES
    merging = 4 * (sizes.hidden + 1) * (sizes.hidden + 1 + 2 * sizes.heads * sizes.head_dim)
    if options.kv_merge == ALIGNED and (options.keep_kv_heads or options.kv_cache_bytes):
        # of the heads that become one, in float64: their moments, what they are multiplied to, eigenvectors, workspace
        merging += 5 * 8 * (sizes.kv_heads // (options.keep_kv_heads or 1) * sizes.head_dim) ** 2
    depth = 4 * (sizes.layers - layers + 1) * DEPTH_POSITIONS * sizes.hidden if layers < sizes.layers else 0
    # the dense model's hidden states, and the products of the FFN's inputs with what is lost
    dense = 4 * (tokens * sizes.hidden + 2 * sizes.hidden * sizes.ffn) if options.error_propagation else 0
    seen, joint = (2 * 4 * tokens * sizes.hidden, _joint(sizes, tokens)) if options.joint_refit else (0, 0)
    work = max(solver, batch + joint, vocabulary, merging, depth)
    alive = 4 * tokens * sizes.hidden + 10 * layer + gram + seen + dense + work
    alive = max(max(alive, first.memory) + tower.held, tower.memory)
    # a quarter more for what the allocator cannot reuse; 128 MiB for stock classes and tokenizer, loaded on first use
    return alive + alive // 4 + 128 * 2**20


def _joint(sizes: Sizes, tokens: int) -> int:
    """Bytes of a joint refit beside what the FFN reads and gives: gate, up and down nine times over (beginning, step,
    residual, direction, product), the kept Gram matrix and its factor, and what is kept of the FFN's inside."""
    factor = (8 if sizes.ffn <= DOUBLE_UP_TO else 4) * sizes.ffn**2
    inside = min(3 * 4 * tokens * sizes.ffn, JOINT_BYTES)
    return 9 * 4 * 3 * sizes.ffn * sizes.hidden + 4 * sizes.ffn**2 + factor + inside


def tokens_of(context: PlanContext) -> int:
    """Tokens of the calibration; an estimate where all of a text is taken."""
    return expected_tokens(context.data["calibration"], "calibration")


def layer_parameters(before: Header) -> int:
    """Parameters of the largest layer."""
    family = family_of(before)
    prefix = family.prefix(family.widest(before))
    return sum(s.parameters for s in before.tensors.values() if s.name.startswith(prefix))
