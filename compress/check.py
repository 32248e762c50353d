"""The self-check: is the folder that was written the model that was meant?

(1) Stock transformers builds it on the meta device from its own config and takes every key. (2) Its logits, streamed
from the written bytes through the stock layer classes, equal what the step computed in memory. (3) Where memory
allows, a full stock load gives the same logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.arch import Family
from compress.checkpoint.headers import read_json
from compress.checkpoint.reader import TORCH_DTYPES, Reader
from compress.errors import SelfCheckError
from compress.formats import format_of
from compress.machine import Machine, Progress
from compress.steps.types import Outcome, StepPlan
from compress.stream.forward import Stream, quiet_transformers

STREAMED = 1e-4  # largest difference of two float32 computations, relative to the spread of the logits
FULL_KL = 0.01  # nats between the stream and a full load, both in the stored dtype; the load rounds its logits to it
KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def self_check(
    folder: Path, family: Family, step: StepPlan, outcome: Outcome, machine: Machine, progress: Progress
) -> tuple[dict[str, Any], str]:
    """Check one step's output; SelfCheckError names what differs.

    Returns what was compared, for the receipt, and apart from it what became of the full load: whether memory allows
    one depends on the moment.
    """
    with progress.task("checking the result", 3) as task:
        report = {"stock_keys": _stock_keys(folder)}
        task.advance()
        report["streamed_logits"] = _streamed(folder, family, step, outcome)
        task.advance()
        if step.after.nbytes * 2 + outcome.logits.nbytes * 3 > machine.available_memory():
            full_load = "left out: it needs more memory than there is"
        else:
            full_load = _full_load(folder, family, step, outcome)
        task.advance()
    return report, full_load


def _stock_keys(folder: Path) -> str:
    quiet_transformers()
    with _no_bars():
        model, info = _stock_class(folder).from_pretrained(
            folder, device_map="meta", output_loading_info=True, local_files_only=True
        )
    del model
    wrong = {kind: sorted(map(str, info[kind])) for kind in KINDS if info.get(kind)}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise SelfCheckError(f"{folder.name}: stock transformers reports {kind}: {names[0]} ({len(names)} in all)")
    return "all taken"


def _streamed(folder: Path, family: Family, step: StepPlan, outcome: Outcome) -> str:
    with Reader(folder) as reader:
        written = {name: (spec.dtype, spec.shape) for name, spec in reader.header.tensors.items()}
        planned = {name: (spec.dtype, spec.shape) for name, spec in step.after.tensors.items()}
        if written != planned:
            raise SelfCheckError(f"{folder.name}: the written tensors are not the planned ones")
        stream = Stream(reader, family, dtype=torch.float32, linear=format_of(reader.header).load)
        difference = _relative(stream.logits(outcome.probe), outcome.logits)
    if not difference <= STREAMED:
        raise SelfCheckError(
            f"{folder.name}: logits streamed from the written files differ from the computed ones by {difference:.2e} "
            f"of their spread (allowed {STREAMED:.0e})"
        )
    return "equal" if difference == 0 else f"within {STREAMED:.0e} of their spread"


def _full_load(folder: Path, family: Family, step: StepPlan, outcome: Outcome) -> str:
    # both in the stored dtype: where activations are rounded (INT8), float32 would be another function
    dtype = TORCH_DTYPES[step.after.dtype]
    ids = outcome.probe[:1]
    with Reader(folder) as reader:
        streamed = Stream(reader, family, dtype=dtype, linear=format_of(reader.header).load).logits(ids)
    divergence = _divergence(_full_logits(folder, ids, dtype), streamed)
    if not divergence <= (1e-6 if dtype == torch.float32 else FULL_KL):
        raise SelfCheckError(f"{folder.name}: a full load in stock transformers differs by KL {divergence:.3g} nats")
    return "same distribution"


def _stock_class(folder: Path) -> Any:
    import transformers

    return getattr(transformers, read_json(folder / "config.json")["architectures"][0])


@contextmanager
def _no_bars() -> Iterator[None]:
    """Loaders of quantized checkpoints draw bars of their own, past transformers' switch."""
    from functools import partialmethod
    from unittest.mock import patch

    from tqdm.std import tqdm

    with patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)):
        yield


@torch.no_grad()
def _full_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with _no_bars():  # compressed-tensors decompresses at the first forward
        model: nn.Module = _stock_class(folder).from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.std().clamp_min(1e-12))


def _divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    total = 0.0
    for p, q in zip(found.flatten(0, 1).split(16), expected.flatten(0, 1).split(16), strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        total += float((log_q.exp() * (log_q - log_p)).sum())
    return total / (found.shape[0] * found.shape[1])
