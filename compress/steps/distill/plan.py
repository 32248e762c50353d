"""Plan of the distill step: shapes stay; what training costs in memory, and what cannot be trained. From headers."""

from __future__ import annotations

from compress.arch import Family, Sizes, family_of
from compress.checkpoint.headers import DTYPE_BYTES, Header
from compress.checkpoint.layout import files_bytes
from compress.errors import UserError, size
from compress.formats import PLAIN, is_quantized
from compress.machine import Precision, cpu_precision
from compress.steps.distill.options import DistillOptions
from compress.steps.types import Complain, PlanContext, StepPlan

CHECKPOINTING = 4 * 2**30  # bytes of saved activations from which layers are computed twice instead
PORTABLE = "prune with flavour portable"
TILES = 64 * 2**20  # a loss works in tiles of a few MiB (losses/forward_kl.py), several at a time


def plan(before: Header, options: DistillOptions, context: PlanContext, complain: Complain) -> StepPlan | None:
    """Complain about what cannot be trained; otherwise the output has the tensors and the config of the input."""
    complaints = 0

    def refuse(key: str, message: str, hint: str | None = None) -> None:
        nonlocal complaints
        complaints += 1
        complain(key, message, hint)

    if is_quantized(before):
        refuse("", "the model is already quantized; distil before quantizing")
        return None
    if family_of(before).stock is not None:
        refuse("", "stock transformers, which trains it, does not load the flavour native", hint=PORTABLE)
    _check_teacher(before, context, refuse)
    if not complaints:
        for whose, header in (("the model", before), ("the teacher", context.teacher)):
            beside = None if header is None else family_of(header).head_beside(header.text_config)
            if beside is not None:  # the loss makes logits from hidden states and output matrix, tile by tile
                refuse("", f"{whose} cannot be distilled: {beside}, and the loss knows none of that")
    if complaints or context.teacher is None:
        return None
    family = family_of(before)
    sizes = family.sizes(before)
    length = context.data["training"].length  # that the source can give such windows is checked for every recipe
    twice = checkpointing(sizes, options.batch * length)
    frozen = len(before.tensors) - len(trained(before, family))
    notes = [f"layers are computed {'twice' if twice else 'once'}, because {_activation_note(sizes, options, length)}"]
    if frozen:
        notes.append(f"{frozen} tensors outside the text model are not trained and pass through unchanged")
    return StepPlan(
        kind="distill",
        options=options,
        before=before,
        after=before.planned(before.config, before.tensors.values()),
        parameters=PLAIN.parameters(before, family),
        nbytes=files_bytes(before.tensors.values(), context.shard_bytes),
        memory=memory(before, context.teacher, family, options.batch * length),
        scratch=checkpoints(before, family),
        notes=tuple(notes),
    )


def trained(header: Header, family: Family) -> tuple[str, ...]:
    """Names on disk of what is trained: the text model and the output matrix."""
    return tuple(name for name in header.tensors if name.startswith((f"{family.root}.", f"{family.head}.")))


def activations(sizes: Sizes, tokens: int, autocast: bool = False) -> int:
    """Bytes that backward needs of the forward pass of `tokens` tokens, all layers."""
    # Counted with torch.autograd.graph.saved_tensors_hooks on llama and glm4v layers (glm4v's four norms need more; its
    # numbers are taken for both). sdpa keeps no attention matrix.
    queries = sizes.heads * sizes.head_dim
    if autocast:
        return tokens * sizes.layers * (36 * sizes.hidden + 8 * queries + 8 * sizes.ffn)
    return tokens * sizes.layers * (46 * sizes.hidden + 8 * queries + 16 * sizes.ffn)


def checkpointing(sizes: Sizes, tokens: int) -> bool:
    """Whether layers are computed a second time in backward instead of keeping what it needs.

    Decided for float32, so that a plan says the same on every machine; the result is the same either way.
    """
    return activations(sizes, tokens) > CHECKPOINTING


def memory(before: Header, teacher: Header, family: Family, tokens: int) -> int:
    """Estimated peak in bytes above interpreter and libraries, for batches of `tokens` tokens.

    Student: 16 bytes a trained parameter (float32 weight, gradient and AdamW's two moments) and 2 for the copy that
    autocast multiplies with; 4 a frozen one. Twice the embedding's gradient besides: with tied weights it is summed
    from two dense parts. Teacher: 2 bytes a parameter if it is stored and computed in bf16, else 4. Activations, or
    with checkpointing one layer's and the layers' inputs.
    """
    sizes = family.sizes(before)
    learning = sum(before.tensors[name].parameters for name in trained(before, family))
    frozen = sum(spec.parameters for spec in before.tensors.values()) - learning
    embedding = 4 * sizes.vocab * sizes.hidden
    precision = cpu_precision()
    teaching = (
        sum(spec.parameters for spec in teacher.tensors.values()) * DTYPE_BYTES[teacher_dtype(teacher, precision)]
    )
    kept = activations(sizes, tokens, precision.native)
    if checkpointing(sizes, tokens):
        kept = kept // sizes.layers + 4 * tokens * sizes.layers * sizes.hidden
    each = 18 if precision.native else 16
    return each * learning + 4 * frozen + 2 * embedding + teaching + kept + TILES


def checkpoints(before: Header, family: Family) -> int:
    """Bytes of the Trainer's checkpoint, and of the next before the first goes: all weights in float32, and AdamW's
    two moments of what is trained."""
    learning = sum(before.tensors[name].parameters for name in trained(before, family))
    return 2 * 4 * (sum(spec.parameters for spec in before.tensors.values()) + 2 * learning)


def teacher_dtype(teacher: Header, precision: Precision) -> str:
    """The teacher is held in bf16 when it is stored and multiplied so, else in float32."""
    return "BF16" if precision.native and teacher.dtype == "BF16" else "F32"


def _activation_note(sizes: Sizes, options: DistillOptions, length: int) -> str:
    taken = size(activations(sizes, options.batch * length))
    return f"float32 activations take {taken} for a batch of {options.batch} x {length} (limit {size(CHECKPOINTING)})"


def _check_teacher(before: Header, context: PlanContext, refuse: Complain) -> None:
    teacher = context.teacher
    if teacher is None:
        refuse("", "distillation needs a teacher")
        return
    if is_quantized(teacher):
        refuse("", "the teacher is quantized", hint="name the original checkpoint as teacher")
        return
    try:
        family = family_of(teacher)
        theirs = family.sizes(teacher).vocab
    except UserError as error:
        refuse("", f"the teacher's {error.message}", error.hint)
        return
    if family.stock is not None:
        refuse("", "stock transformers does not load a teacher of the flavour native", hint=PORTABLE)
    ours = family_of(before).sizes(before).vocab
    if theirs != ours:
        refuse("", f"the teacher has another vocabulary: {theirs} tokens, the model has {ours}")
