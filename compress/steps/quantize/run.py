"""The quantize step: tensor by tensor, in blocks of rows; the model is never loaded.

Scales are per output row, so rows are independent and any split gives the same bytes. What the written folder must
compute is known beforehand: a probe through the source's layers with every linear packed in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch

from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.formats import Format, Plain, decoder_linears, format_named, row_blocks
from compress.steps.quantize.options import QuantizeOptions
from compress.steps.quantize.plan import PROBE
from compress.steps.types import Job, Outcome
from compress.stream.forward import Stream


@dataclass
class Rounding:
    """What rounding did to the tensors of one kind: relative Frobenius errors, one a tensor, and the largest."""

    errors: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "tensors": len(self.errors),
            "mean_relative_error": _digits(sum(self.errors) / len(self.errors)),
            "max_relative_error": _digits(max(self.errors)),
        }


@dataclass
class Lost:
    """Values that a cast to a narrower float turned into zero, or into subnormals, which hold fewer bits."""

    zero: int = 0
    subnormal: int = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        if before.dtype != after.dtype:
            size = after.abs()
            self.zero += int(((before != 0) & (size == 0)).sum())
            self.subnormal += int(((size != 0) & (size < torch.finfo(after.dtype).smallest_normal)).sum())


def run(job: Job) -> Outcome:
    """Write `job.target` in the planned format; the outcome's logits are those of the source, packed in memory.

    Raises UserError naming the tensor for NaN, infinity, or a value that the format's float cannot hold.
    """
    how = format_named(cast(QuantizeOptions, job.plan.options).format)
    after = job.plan.after
    kinds: dict[str, Rounding] = {}
    lost = Lost()
    with Reader(job.source) as reader:
        linears = set(decoder_linears(reader.header, job.family))
        with Writer(job.target, after.tensors.values(), job.shard_bytes) as writer:
            writer.carry(job.source)
            writer.config(after.config, job.source)
            with job.progress.task(f"writing {how.name}", len(reader.header.tensors)) as task:
                for name, spec in reader.header.tensors.items():
                    module = name.removesuffix(".weight")
                    if after.tensors.get(name) == spec:
                        writer.copy(reader, name)
                    elif module in linears:
                        error = _pack(reader, writer, how, module, lost)
                        kinds.setdefault(_kind(module), Rounding()).errors.append(error)
                    else:
                        _cast(reader, writer, how, name, lost)
                    task.advance()
        probe, logits = _probe(job, reader, how)
    receipt: dict[str, Any] = {
        "format": how.name,
        "linears": len(linears),
        "bytes_before": reader.header.stored_bytes(),
        "bytes_after": job.plan.nbytes,
        "rounding": {kind: kinds[kind].summary() for kind in sorted(kinds)},
    }
    if isinstance(how, Plain):
        receipt |= {"flushed_to_zero": lost.zero, "subnormal": lost.subnormal}
    return Outcome(receipt=receipt, probe=probe, logits=logits)


def _pack(reader: Reader, writer: Writer, how: Format, module: str, lost: Lost) -> float:
    """Write one linear in its stored form; its rounding error, relative, in the Frobenius norm."""
    name = f"{module}.weight"
    rows, columns = reader.spec(name).shape
    difference = total = 0.0
    for start, stop in row_blocks(rows, columns):
        block = reader.rows(name, slice(start, stop))
        stored = how.pack_rows(module, block)
        for key, value in stored.items():
            writer.put_rows(key, start, value)
        if isinstance(how, Plain):
            lost.add(block, stored[name])
        restored = how.unpack(module, stored | how.constants(module, (stop - start, columns)), torch.float32)
        wide = block.float()
        total += _squares(wide)
        difference += _squares(restored.sub_(wide))
    for key, value in how.constants(module, (rows, columns)).items():
        writer.put(key, value)
    return (difference / total) ** 0.5 if total else 0.0


def _squares(rows: torch.Tensor) -> float:
    """Sum of squares: a row in float32, whatever the blocks and threads, and the rows in float64."""
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _cast(reader: Reader, writer: Writer, how: Format, name: str, lost: Lost) -> None:
    """Write a tensor that is no decoder linear in another float, in blocks of rows."""
    spec = reader.spec(name)
    if not spec.shape or not spec.parameters:
        value = reader.tensor(name)
        writer.put(name, how.cast(name, value))
        return
    for start, stop in row_blocks(spec.shape[0], spec.parameters // spec.shape[0]):
        block = reader.rows(name, slice(start, stop))
        value = how.cast(name, block)
        lost.add(block, value)
        writer.put_rows(name, start, value)


class _Rounded(Reader):
    """A Reader whose tensors hold the values that a plain format leaves: what a cast folder will compute with."""

    def __init__(self, reader: Reader, how: Plain) -> None:
        super().__init__(reader.folder, reader.header)
        self._how = how

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        value = self._how.cast(name, super().tensor(name))
        return value if dtype is None else value.to(dtype)

    def rows(self, name: str, index: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        value = self._how.cast(name, super().rows(name, index))
        return value if dtype is None else value.to(dtype)


def _probe(job: Job, reader: Reader, how: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and the float32 logits that the written folder must give for them.

    Ids stay below half of the vocabulary: the marks of images and videos stand at its end.
    """
    vocab = job.family.sizes(reader.header).vocab
    ids = torch.randint(0, max(1, vocab // 2), PROBE, generator=torch.Generator().manual_seed(job.seed))
    job.progress.note(f"computing what {how.name} must give for {PROBE[0]} x {PROBE[1]} probe tokens")
    if isinstance(how, Plain):
        with _Rounded(reader, how) as rounded:
            return ids, _logits(Stream(rounded, job.family, dtype=torch.float32), ids, job)
    return ids, _logits(Stream(reader, job.family, dtype=torch.float32, linear=how.repack), ids, job)


def _logits(stream: Stream, ids: torch.Tensor, job: Job) -> torch.Tensor:
    return stream.head_logits(stream.hidden(ids, job.progress, "probing"))


def _kind(module: str) -> str:
    """`model.layers.3.mlp.down_proj` -> `mlp.down_proj`."""
    return module.split(".layers.", 1)[1].split(".", 1)[1]


def _digits(value: float) -> float:
    # sums over blocks may differ in their last bits; the receipt must not
    return float(f"{value:.6g}")
