"""Quality of a checkpoint, streamed: perplexity, and against a reference KL divergence and top-1 agreement.

Layers run in the checkpoint's own dtype, as stock transformers would run them; logits are compared in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.arch import family_of
from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import Reader
from compress.data import DataSpec, windows
from compress.errors import UserError
from compress.formats import format_of
from compress.machine import Machine, Progress, Silent
from compress.stream.forward import Stream, compute_dtype

HEAD_TOKENS = 512  # tokens whose float32 logits are alive at once, for each of the two models


@dataclass(frozen=True)
class _Model:
    """A checkpoint whose final hidden states [N, L, hidden] for the evaluation windows are known."""

    stream: Stream
    hidden: torch.Tensor


class Evaluator:
    """Measures folders on one set of windows against one reference, whose forward pass is run once and kept."""

    def __init__(
        self,
        tokenizer: Path,
        data: DataSpec,
        *,
        seed: int = 0,
        reference: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.progress = progress or Silent()
        self.tokens = windows(data, "evaluation", tokenizer, seed)
        self.ids = torch.from_numpy(self.tokens.ids)
        self.reference_folder = reference
        self.reference = None if reference is None else self._forward(reference, "reference")

    def _forward(self, folder: Path, label: str) -> _Model:
        reader = Reader(folder)
        family = family_of(reader.header)
        dtype, _ = compute_dtype(reader.header.dtype)
        stream = Stream(reader, family, dtype=dtype, linear=format_of(reader.header).load)
        return _Model(stream, stream.hidden(self.ids, self.progress, f"evaluating {label}"))

    def measure(self, folder: Path, label: str) -> dict[str, Any]:
        """perplexity, tokens, parameters, bytes; with a reference reference_perplexity, perplexity_ratio, kl (nats,
        reference to folder) and top1_agreement (share of positions whose likeliest next token is the same)."""
        header = read_header(folder)
        same = self.reference if folder == self.reference_folder else None
        model = same or self._forward(folder, label)
        sums = self._sums(model)
        count = self.ids.shape[0] * (self.ids.shape[1] - 1)
        found: dict[str, Any] = {
            "perplexity": math.exp(sums["nll"] / count),
            "tokens": count,
            "parameters": format_of(header).parameters(header, family_of(header)),
            "bytes": header.stored_bytes(),
        }
        if self.reference is not None:
            found |= {
                "reference_perplexity": math.exp(sums["reference_nll"] / count),
                "perplexity_ratio": math.exp((sums["nll"] - sums["reference_nll"]) / count),
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
                log_p = _log_probabilities(model.stream, mine[part])
                target = labels[part, None]
                totals["nll"] -= float(log_p.gather(1, target).sum(dtype=torch.float64))
                if theirs is not None and self.reference is not None:
                    log_q = _log_probabilities(self.reference.stream, theirs[part])
                    if log_q.shape != log_p.shape:
                        raise UserError(
                            f"the reference has {log_q.shape[1]} tokens in its vocabulary, not {log_p.shape[1]}"
                        )
                    totals["reference_nll"] -= float(log_q.gather(1, target).sum(dtype=torch.float64))
                    totals["agree"] += float((log_q.argmax(1) == log_p.argmax(1)).sum())
                    totals["kl"] += float((log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64))
                task.advance()
        return totals


def _log_probabilities(stream: Stream, hidden: torch.Tensor) -> torch.Tensor:
    return stream.head_logits(hidden[None])[0].log_softmax(-1)


def evaluate(
    folder: Path,
    data: DataSpec,
    machine: Machine,
    *,
    reference: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate one folder; see `Evaluator.measure` for the keys."""
    torch.set_num_threads(machine.threads)
    return Evaluator(folder, data, seed=seed, reference=reference, progress=progress).measure(folder, "model")
