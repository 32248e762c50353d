"""What a criterion takes of the whole model before the first layer is cut, as a plan tells it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from compress.arch import Family, Sizes
from compress.checkpoint.headers import Header
from compress.criteria import CRITERIA
from compress.data import expected_tokens
from compress.errors import size
from compress.limits import BATCH_TOKENS, TAPE_BYTES, VOCAB_BYTES, vocab_rows
from compress.steps.prune.options import PruneOptions
from compress.steps.types import Complain, PlanContext
from compress.stream import GRADIENTS


@dataclass(frozen=True)
class Ahead:
    """Bytes of memory at its peak, before any allowance, and of disk; and what it is, in words."""

    memory: int = 0
    scratch: int = 0
    notes: tuple[str, ...] = ()


def ahead(
    options: PruneOptions, before: Header, family: Family, layer: int, context: PlanContext, complain: Complain
) -> Ahead:
    """What `options.criterion` takes first. `layer`: parameters of the largest layer."""
    needs = CRITERIA[options.criterion].needs
    if not needs & GRADIENTS or options.from_sensitivity is not None:
        return Ahead()
    if (beside := family.head_beside(before.text_config)) is not None:
        complain("criterion", f"{options.criterion} needs the gradient of the loss, which knows none of this: {beside}")
    data, sizes = context.data["calibration"], family.sizes(before)
    windows = min(options.gradient_samples, expected_tokens(data, "calibration") // data.length)
    tokens = windows * data.length
    tape = 4 * sizes.layers * tokens * sizes.hidden
    inside, outside = (tape, 0) if tape <= TAPE_BYTES else (0, tape)
    weights = (12 if "taylor" in needs else 4) * layer  # as they are; the sum of their gradients, and those of a batch
    alive = inside + 4 * tokens * sizes.hidden + max(weights + _graph(sizes, data.length), _head(sizes, data.length))
    where = f"; its layers' inputs lie on the disk meanwhile ({size(outside)})" if outside else ""
    note = f"{options.criterion}: first a backward pass of the dense model, {windows} x {data.length} tokens{where}"
    return Ahead(alive, outside, (note,))


def _graph(sizes: Sizes, length: int) -> int:
    """Bytes of what one batch leaves behind in a layer, for its backward pass, and of the gradients there."""
    queries = sizes.heads * sizes.head_dim
    return 4 * max(BATCH_TOKENS, length) * (8 * sizes.ffn + 10 * queries + 16 * sizes.hidden)


def _head(sizes: Sizes, length: int) -> int:
    """Bytes of one batch at the output matrix: logits of a block of the vocabulary, and mean rows."""
    rows = min(vocab_rows(sizes.hidden), sizes.vocab)
    return 4 * max(BATCH_TOKENS, length) * (3 * rows + 10 * sizes.hidden) + 2 * VOCAB_BYTES
