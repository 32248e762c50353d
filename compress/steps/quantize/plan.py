"""Plan of the quantize step, from headers alone: what is stored how, the bytes of every shard, memory, refusals."""

from __future__ import annotations

from compress.arch import Family, family_of
from compress.checkpoint.headers import DTYPE_BYTES, Header
from compress.checkpoint.layout import files_bytes
from compress.errors import UserError
from compress.formats import PLAIN, Format, Plain, decoder_linears, format_named, format_of
from compress.formats.format import BLOCK_BYTES, FLOATS
from compress.steps.quantize.options import QuantizeOptions
from compress.steps.types import Complain, PlanContext, StepPlan

PROBE = (2, 64)  # windows and tokens of the probe: enough to tell a wrong scale, cheap on 10 B parameters
VOCAB_ROWS = 16384  # rows of the output matrix that a probe holds at once


def plan(before: Header, options: QuantizeOptions, context: PlanContext, complain: Complain) -> StepPlan | None:
    """None after a complaint: unknown format, input that is quantized already or has no float linears."""
    how = _format(before, options, complain)
    if how is None:
        return None
    family = family_of(before)
    linears = decoder_linears(before, family)
    other = next((t for t in (before.tensors[f"{m}.weight"] for m in linears) if t.dtype not in FLOATS), None)
    if other is not None:
        complain("", f"tensor '{other.name}' has dtype {other.dtype}; only float checkpoints can be quantized")
        return None
    if not linears:
        complain("", f"the checkpoint has no linear below '{family.text}.layers', so nothing to quantize")
        return None
    after = how.plan(before, linears)
    return StepPlan(
        kind="quantize",
        options=options,
        before=before,
        after=after,
        parameters=how.parameters(after, family),
        nbytes=files_bytes(after.tensors.values(), context.shard_bytes),
        memory=_memory(before, family),
        notes=_notes(before, after, how, linears, family),
    )


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


def _memory(before: Header, family: Family) -> int:
    """Packing holds five blocks of rows (source, float32, quotient, codes, restored). The probe needs more: one
    decoder layer in float32 and its largest matrix as it is read and as it is stored, or a block of the output matrix
    with the logits."""
    sizes = family.sizes(before)
    first = family.prefix(0)
    layer = [t for name, t in before.tensors.items() if name.startswith(first)]
    largest = max((t.parameters for t in layer), default=0)
    width = max((DTYPE_BYTES[t.dtype] for t in layer), default=4)
    head = min(VOCAB_ROWS, sizes.vocab) * sizes.hidden * (4 + width) + PROBE[0] * PROBE[1] * sizes.vocab * 4
    probe = 4 * sum(t.parameters for t in layer) + (width + 4) * largest
    return max(5 * BLOCK_BYTES, probe, head)
