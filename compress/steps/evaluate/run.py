"""Quality of a checkpoint, streamed: perplexity, and against a reference KL divergence and top-1 agreement.

Layers run in the checkpoint's own dtype, as stock transformers would run them; logits are compared in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from compress.arch import family_of
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.reader import Reader
from compress.data import DataSpec, windows
from compress.device import device_errors, device_of
from compress.errors import MachineError, UserError, size
from compress.formats import format_of, open_stream
from compress.limits import HEAD_TOKENS
from compress.machine import Machine, Progress, Silent
from compress.stream.forward import Stream, compute_dtype
from compress.stream.loss import log_probabilities


@dataclass(frozen=True)
class _Model:
    """A checkpoint whose final hidden states [N, L, hidden] for the evaluation windows are known."""

    stream: Stream
    hidden: torch.Tensor


class Evaluator:
    """Measures folders on one set of windows against one reference, whose forward pass is run once, with the first
    folder, and kept. The reference's files are open until `close`; use as a context manager."""

    def __init__(
        self,
        tokenizer: Path,
        data: DataSpec,
        *,
        seed: int = 0,
        reference: Path | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.progress, self.device = progress or Silent(), device
        self.tokens = windows(data, "evaluation", tokenizer, seed, progress=self.progress)
        self.ids = torch.from_numpy(self.tokens.ids)
        self.reference_folder = reference
        self.reference: _Model | None = None
        self._reference_reader = None if reference is None else Reader(reference, device=device)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the reference: its files and its hidden states."""
        self.reference = None
        if self._reference_reader is not None:
            self._reference_reader.__exit__(None, None, None)

    def memory(self, folder: Path) -> int:
        """Bytes that measuring `folder` takes at least: hidden states of all windows, two blocks of logits."""
        header = read_header(folder)
        sizes = family_of(header).sizes(header)
        hidden = sizes.hidden
        if self._reference_reader is not None and folder != self.reference_folder:
            other = self._reference_reader.header
            hidden += family_of(other).sizes(other).hidden
        return 4 * (self.ids.numel() * hidden + 2 * HEAD_TOKENS * sizes.vocab)

    def measure(self, folder: Path, label: str) -> dict[str, Any]:
        """perplexity, tokens, parameters, bytes; with a reference reference_perplexity, perplexity_ratio, kl (nats,
        reference to folder) and top1_agreement (share of positions whose likeliest next token is the same)."""
        header = read_header(folder)
        if self._reference_reader is not None:
            check_vocabulary(header, self._reference_reader.header)
            if self.reference is None:
                self.reference = self._forward(self._reference_reader, "reference")
        if self.reference is not None and folder == self.reference_folder:
            sums = self._sums(self.reference)
        else:
            with Reader(folder, header, self.device) as reader:
                sums = self._sums(self._forward(reader, label))
        return self._numbers(header, sums)

    def _forward(self, reader: Reader, label: str) -> _Model:
        dtype, _ = compute_dtype(reader.header.dtype, self.device)
        stream = open_stream(reader, dtype)
        return _Model(stream, stream.hidden(self.ids, self.progress, f"evaluating {label}"))

    def _numbers(self, header: Header, sums: dict[str, float]) -> dict[str, Any]:
        count = self.ids.shape[0] * (self.ids.shape[1] - 1)
        found: dict[str, Any] = {
            "perplexity": _exp(sums["nll"] / count),
            "tokens": count,
            "parameters": format_of(header).parameters(header, family_of(header)),
            "bytes": header.stored_bytes(),
        }
        if self.reference is not None:
            found |= {
                "reference_perplexity": _exp(sums["reference_nll"] / count),
                "perplexity_ratio": _exp((sums["nll"] - sums["reference_nll"]) / count),
                "kl": sums["kl"] / count,
                "top1_agreement": sums["agree"] / count,
            }
        return found

    @torch.no_grad()
    def _sums(self, model: _Model) -> dict[str, float]:
        """Sums over all predicted positions, float64."""
        totals = dict.fromkeys(("nll", "reference_nll", "kl", "agree"), 0.0)
        labels = self.ids[:, 1:].flatten()
        mine = model.hidden[:, :-1].flatten(0, 1)
        theirs = None if self.reference is None else self.reference.hidden[:, :-1].flatten(0, 1)
        with self.progress.task("comparing logits", -(-len(mine) // HEAD_TOKENS)) as task:
            for start in range(0, len(mine), HEAD_TOKENS):
                part = slice(start, start + HEAD_TOKENS)
                log_p = log_probabilities(model.stream, mine[part])
                target = labels[part, None].to(log_p.device)
                totals["nll"] -= float(log_p.gather(1, target).sum(dtype=torch.float64))
                if theirs is not None and self.reference is not None:
                    log_q = log_probabilities(self.reference.stream, theirs[part])
                    totals["reference_nll"] -= float(log_q.gather(1, target).sum(dtype=torch.float64))
                    totals["agree"] += float((log_q.argmax(1) == log_p.argmax(1)).sum())
                    totals["kl"] += float((log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64))
                task.advance()
        return totals


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # above 709 nats: no float64 holds it
        return math.inf


def check_vocabulary(header: Header, reference: Header) -> None:
    """Refuse a reference whose logits cannot be compared token by token."""
    mine, theirs = family_of(header).sizes(header).vocab, family_of(reference).sizes(reference).vocab
    if mine != theirs:
        raise UserError(f"the reference has {theirs} tokens in its vocabulary, the model {mine}")


def evaluate(
    folder: Path,
    data: DataSpec,
    machine: Machine,
    *,
    reference: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate one folder; see `Evaluator.measure` for the keys.

    Raises UserError for a reference with another vocabulary and MachineError for too little memory, both before any
    forward pass. Whether the tensors have the shapes that the config implies is the caller's to check.
    """
    if reference is not None:
        check_vocabulary(read_header(folder), read_header(reference))
    torch.set_num_threads(machine.threads)
    device = device_of(machine)
    with (
        device_errors(),
        Evaluator(folder, data, seed=seed, reference=reference, device=device, progress=progress) as evaluator,
    ):
        needed, available = evaluator.memory(folder), machine.available_memory()
        if needed > available:
            raise MachineError(
                f"the evaluation needs at least {size(needed)} of memory, {size(available)} are available",
                hint="fewer --samples or a smaller --length need less",
            )
        return evaluator.measure(folder, "model")
