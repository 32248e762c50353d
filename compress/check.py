"""The self-check: is the folder that was written the model that was meant?

(1) Stock transformers builds it on the meta device from its own config and takes every key. (2) Its logits, streamed
from the written bytes through the stock layer classes, equal what the step computed in memory. (3) Where memory
allows, a full stock load gives the same logits again.

A family that stock transformers does not load (Family.stock) is checked through the equal stock class: (1) with its
config, (2) as it is streamed, and without (3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.arch import Family, family_of
from compress.checkpoint.headers import read_json
from compress.checkpoint.reader import TORCH_DTYPES, Reader
from compress.errors import CompressError, SelfCheckError, UserError
from compress.formats import open_stream
from compress.machine import Machine, Progress
from compress.steps.types import Outcome, StepPlan
from compress.stream.stock import quiet, stock_class, stock_config

STREAMED = 1e-4  # largest difference of two float32 computations, relative to the spread of the logits
FULL_KL = 0.01  # nats between the stream and a full load, both in the stored dtype; the load rounds its logits to it
KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def self_check(
    folder: Path, step: StepPlan, outcome: Outcome, machine: Machine, progress: Progress
) -> tuple[dict[str, Any], str]:
    """Check one step's output; SelfCheckError names what differs.

    Returns what was compared, for the receipt, and apart from it what became of the full load: whether memory allows
    one depends on the moment.
    """
    with progress.task("checking the result", 3) as task:
        family = family_of(step.after)
        report = {"stock_keys": _stock_keys(folder, family)}
        task.advance()
        report["streamed_logits"] = _streamed(folder, step, outcome)
        task.advance()
        if family.stock is not None:
            full_load = f"left out: stock transformers does not load {family.name}"
        elif step.after.nbytes * 2 + outcome.logits.nbytes * 3 > machine.available_memory():
            full_load = "left out: it needs more memory than there is"
        else:
            full_load = _full_load(folder, step, outcome)
        task.advance()
    return report, full_load


def check_source(folder: Path) -> None:
    """Refuse, before any work, what stock transformers would not load or run as it is: UserError names the first tensor
    that is missing, of another shape or too many. Plans have compared the decoder; this is for all the rest."""
    try:
        with Reader(folder) as reader:
            _stock_keys(folder, family_of(reader.header))
            open_stream(reader, torch.float32)  # rehearses a layer
    except SelfCheckError as error:
        raise UserError(error.message) from None
    except CompressError:
        raise
    except Exception as error:  # shapes that it will not take, a config that it will not build
        raise UserError(f"{folder.name}/config.json: stock transformers does not load it: {_told(error)}") from error


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _stock_keys(folder: Path, family: Family) -> str:
    raw = read_json(folder / "config.json")
    equal = None if family.stock is None else family.stock.config(raw)
    kind = stock_class(equal or raw, folder)
    given = {} if equal is None else {"config": stock_config(equal)}
    with quiet():
        model, info = kind.from_pretrained(
            folder,
            **given,
            device_map="meta",
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are told by name below
        )
    del model
    wrong = {kind: sorted(map(str, info[kind])) for kind in KINDS if info.get(kind)}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise SelfCheckError(f"{folder.name}: stock transformers reports {kind}: {names[0]} ({len(names)} in all)")
    return "all taken" if equal is None else f"all taken by {kind.__name__}, which computes the same"


def _streamed(folder: Path, step: StepPlan, outcome: Outcome) -> str:
    with Reader(folder) as reader:
        written = {name: (spec.dtype, spec.shape) for name, spec in reader.header.tensors.items()}
        planned = {name: (spec.dtype, spec.shape) for name, spec in step.after.tensors.items()}
        if written != planned:
            raise SelfCheckError(f"{folder.name}: the written tensors are not the planned ones")
        difference = _relative(open_stream(reader, torch.float32).logits(outcome.probe), outcome.logits)
    if not difference <= STREAMED:
        raise SelfCheckError(
            f"{folder.name}: logits streamed from the written files differ from the computed ones by {difference:.2e} "
            f"of their spread (allowed {STREAMED:.0e})"
        )
    return "equal" if difference == 0 else f"within {STREAMED:.0e} of their spread"


def _full_load(folder: Path, step: StepPlan, outcome: Outcome) -> str:
    # both in the stored dtype: where activations are rounded (INT8), float32 would be another function
    dtype = TORCH_DTYPES[step.after.dtype]
    ids = outcome.probe[:1]
    with Reader(folder) as reader:
        streamed = open_stream(reader, dtype).logits(ids)
    divergence = _divergence(_full_logits(folder, ids, dtype), streamed)
    if not divergence <= (1e-6 if dtype == torch.float32 else FULL_KL):
        raise SelfCheckError(f"{folder.name}: a full load in stock transformers differs by KL {divergence:.3g} nats")
    return "same distribution"


@torch.no_grad()
def _full_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kind = stock_class(read_json(folder / "config.json"), folder)
    with quiet():  # compressed-tensors decompresses at the first forward, with a bar
        model: nn.Module = kind.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
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
