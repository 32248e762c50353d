"""Plan of the quantize step, from headers alone: what is stored how, the bytes of every shard, memory, refusals."""

from __future__ import annotations

from compress.arch import Family, family_of
from compress.checkpoint.headers import DTYPE_BYTES, Header
from compress.checkpoint.layout import files_bytes
from compress.errors import UserError
from compress.formats import PLAIN, Format, Plain, decoder_linears, format_named, format_of
from compress.formats.format import BLOCK_BYTES, FLOATS
from compress.limits import BEHIND, PACKERS, vocab_rows
from compress.steps.quantize.options import QuantizeOptions
from compress.steps.types import Complain, PlanContext, StepPlan

PROBE = (2, 16)  # windows and tokens of the probe: enough to tell a wrong scale, cheap on 10 B parameters
BLOCKS = 10  # of rows, alive at once: as they are read, wide, scaled, as codes, restored
SPARE = 128 * 2**20  # what libraries allocate for themselves while they work, and threads keep of what is freed


def plan(before: Header, options: QuantizeOptions, context: PlanContext, complain: Complain) -> StepPlan | None:
    """None after a complaint: unknown format, input that is quantized already or has no float linears."""
    how = _format(before, options, complain)
    if how is None:
        return None
    family = family_of(before)
    if family.stock is not None and how.stock_only:
        unread = f"the flavour native of glm4v is read by vLLM alone, and {how.name} by stock transformers alone"
        complain("format", unread, "w8a8 for vLLM, or prune with flavour portable")
        return None
    linears = decoder_linears(before, family)
    other = next((t for t in (before.tensors[f"{m}.weight"] for m in linears) if t.dtype not in FLOATS), None)
    if other is not None:
        complain("", f"tensor '{other.name}' has dtype {other.dtype}; only float checkpoints can be quantized")
        return None
    if not linears:
        complain("", f"the checkpoint has no linear below '{family.inside[:-1]}', so nothing to quantize")
        return None
    after = how.plan(before, linears)
    return StepPlan(
        kind="quantize",
        options=options,
        before=before,
        after=after,
        parameters=how.parameters(after, family),
        nbytes=files_bytes(after.tensors.values(), context.shard_bytes),
        memory=_memory(before, after, how, linears, family, min(context.threads, PACKERS)),
        notes=_notes(before, after, how, linears, family),
    )


def units(header: Header, family: Family) -> list[tuple[str, ...]]:
    """The names of all tensors in the order in which they are done: one entry a decoder layer, and one for the rest."""
    prefixes = [family.prefix(index) for index in range(family.sizes(header).layers)]
    layers = [tuple(name for name in header.tensors if name.startswith(prefix)) for prefix in prefixes]
    inside = {name for names in layers for name in names}
    return [*layers, tuple(name for name in header.tensors if name not in inside)]


def _format(before: Header, options: QuantizeOptions, complain: Complain) -> Format | None:
    try:
        found = format_of(before)
    except UserError as error:
        complain("", error.message, error.hint)
        return None
    if found is not PLAIN:
        complain("", f"the input is quantized already ({found.name})", "start from the plain checkpoint it was made of")
        return None
    return format_named(options.format)


def _notes(before: Header, after: Header, how: Format, linears: tuple[str, ...], family: Family) -> tuple[str, ...]:
    changed = [name for name, spec in before.tensors.items() if after.tensors.get(name) != spec]
    if not changed:
        return (f"every float tensor is {how.name} already: the weights are copied as they are",)
    notes = [f"{len(linears)} decoder linears become {how.about}"]
    if not isinstance(how, Plain):
        kept = [t for name, t in before.tensors.items() if name in after.tensors and after.tensors[name] == t]
        skipped = ", ".join(("embeddings", "norms", "biases", *family.skip))
        notes.append(
            f"{len(kept)} tensors ({sum(t.nbytes for t in kept) / 1e9:.3g} GB) stay as they are, because only decoder "
            f"linears are quantized: {skipped}"
        )
    return tuple(notes)


def _memory(before: Header, after: Header, how: Format, linears: tuple[str, ...], family: Family, packers: int) -> int:
    """Blocks of rows for each of `packers` and one that waits; what waits to be written; and the larger of two: a layer
    as it is stored, with the probe's modules of it and a copy of the largest codes; or a block of the output matrix as
    it is read, stored and multiplied, with the probe's logits."""
    sizes, first = family.sizes(before), family.prefix(family.widest(before))
    stored = sum(t.nbytes for name, t in after.tensors.items() if name.startswith(first))
    weights = [before.tensors[f"{module}.weight"] for module in linears if module.startswith(first)]
    layer = (
        stored + sum(how.module_bytes(weight) for weight in weights) + max((w.parameters for w in weights), default=0)
    )
    width = max(DTYPE_BYTES[t.dtype] for t in before.tensors.values())
    tokens = PROBE[0] * PROBE[1]
    head = min(vocab_rows(sizes.hidden), sizes.vocab) * sizes.hidden * (4 + 2 * width) + 4 * tokens * sizes.vocab
    activations = 4 * tokens * 4 * (sizes.hidden + sizes.ffn + sizes.heads * sizes.head_dim)
    return max(layer, head) + activations + (packers + 1) * BLOCKS * BLOCK_BYTES + BEHIND + SPARE
