"""The quantize step: one pass over the source, layer by layer; the model is never loaded.

Each tensor is read once, packed in blocks of rows and written. What the written folder must compute is known
beforehand: a probe passes through every layer as it was packed, before the layer is let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from compress.checkpoint.headers import Header
from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.errors import UserError
from compress.formats import decoder_linears, format_named, open_stream
from compress.formats.packing import Packer
from compress.limits import vocab_rows
from compress.machine import torch_threads
from compress.steps.quantize.options import QuantizeOptions
from compress.steps.quantize.plan import PROBE, units
from compress.steps.types import Job, Outcome
from compress.stream.forward import Stream


def run(job: Job) -> Outcome:
    """Write `job.target` in the planned format; the outcome's logits are those that its stored tensors give.

    Raises UserError naming the tensor for NaN, infinity, or a value that the format's float cannot hold.
    """
    how = format_named(cast(QuantizeOptions, job.plan.options).format)
    after = job.plan.after
    with (
        torch_threads(job.machine.threads - 1),  # one core is the writer's
        Reader(job.source, job.plan.before) as reader,
        Writer(job.target, after.tensors.values(), job.shard_bytes, keep=job.ledger is not None) as writer,
    ):
        packer = Packer(writer, how, decoder_linears(reader.header, job.family), job.machine.threads)
        stream = open_stream(packer.written(reader, after), torch.float32)
        *layers, rest = units(reader.header, job.family)
        ids = _probe_ids(job, reader.header)
        done, hidden = _begin(job, writer, packer, stream, ids)
        with job.progress.task(f"writing {how.name}", len(layers) + 1) as task:
            task.advance(done, earlier=True)
            for index in range(done, len(layers)):
                reader.prefetch(layers[index + 1] if index + 1 < len(layers) else rest[:1])
                _layer(index, layers[index], reader, packer, stream, hidden)
                _save(job, writer, packer, index + 1, hidden)
                task.advance()
            logits = _rest(rest, reader, packer, stream, hidden)
            if not bool(torch.isfinite(logits).all()):
                raise UserError(f"{job.source.name}: its logits are NaN or infinite: they overflow")
            task.advance()
        writer.config(after.config, job.source)
        writer.carry(job.source)
    sizes: dict[str, Any] = {"bytes_before": reader.header.stored_bytes(), "bytes_after": job.plan.nbytes}
    return Outcome(receipt=packer.receipt() | sizes, probe=ids, logits=logits)


def _probe_ids(job: Job, header: Header) -> torch.Tensor:
    """Token ids [windows, tokens], below half of the vocabulary: the marks of images and videos stand at its end."""
    vocab = job.family.sizes(header).vocab
    return torch.randint(0, max(1, vocab // 2), PROBE, generator=torch.Generator().manual_seed(job.seed))


def _begin(job: Job, writer: Writer, packer: Packer, stream: Stream, ids: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many layers an earlier run has done, and the probe's hidden states [N, L, hidden] after them."""
    state = None if job.ledger is None else job.ledger.load()
    if state is None or not writer.kept:
        return 0, stream.embed(ids)
    writer.resume(state.facts["written"])
    packer.restore(state.facts["packed"])
    done = int(state.facts["layers"])
    job.progress.note(f"going on after {done} layers, where an earlier run ended")
    return done, state.tensors["hidden"]


def _save(job: Job, writer: Writer, packer: Packer, done: int, hidden: torch.Tensor) -> None:
    """Leave a state for a later run, if it is time."""
    if job.ledger is not None and job.ledger.due():
        writer.sync()
        facts = {"layers": done, "written": sorted(writer.written), "packed": packer.state()}
        job.ledger.save(facts, {"hidden": hidden})


def _layer(
    index: int, names: Sequence[str], reader: Reader, packer: Packer, stream: Stream, hidden: torch.Tensor
) -> None:
    """Write one decoder layer, and pass the probe's hidden states [N, L, hidden] through it, in place."""
    for name in names:
        packer.take(reader, name)
    with stream.layer(index) as layer:
        stream.advance(layer, hidden)
    packer.release()


@torch.no_grad()
def _rest(names: Sequence[str], reader: Reader, packer: Packer, stream: Stream, hidden: torch.Tensor) -> torch.Tensor:
    """Write what is outside the layers; returns the probe's logits [N, L, vocab], from the output matrix in passing."""
    head = stream.family.head_tensor(reader.header)
    vocab, step = reader.spec(head).shape[0], vocab_rows(hidden.shape[-1])
    normed = stream.norm(hidden).flatten(0, 1)
    logits = torch.empty(len(normed), vocab)
    for index, name in enumerate(names):
        reader.prefetch(names[index + 1 : index + 2])
        if name != head:
            packer.take(reader, name, hold=False)
            continue
        for start in range(0, vocab, step):  # the blocks of Stream.head: the very same products
            rows = packer.put_rows(name, start, reader.rows(name, slice(start, start + step)))
            stream.output(normed, rows.float(), logits[:, start : start + len(rows)], start)
    return logits.view(*hidden.shape[:2], vocab)
