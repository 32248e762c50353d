"""The self-check: is the folder that was written the model that was meant?

(1) Stock transformers builds it on the meta device from its own config and takes every key. (2) Its logits, streamed
from the written bytes through the stock layer classes, equal what the step computed in memory. (3) Stock transformers
really loads it, with as many of its first layers as the memory takes that the plan asked for, and gives the same again.

A family that stock transformers does not load (Family.stock) is checked through the equal stock class: (1) with its
config, (2) as it is streamed, and without (3).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.arch import Family, family_of
from compress.checkpoint import per_layer
from compress.checkpoint.headers import DTYPE_BYTES, Header, read_json
from compress.checkpoint.reader import TORCH_DTYPES, Reader
from compress.checkpoint.stock import stock_class
from compress.errors import CompressError, SelfCheckError, UserError
from compress.formats import format_of, open_stream
from compress.machine import Progress
from compress.steps.types import Outcome, StepPlan
from compress.stream.stock import quiet, stock_config

STREAMED = 1e-4  # largest difference of two float32 computations, relative to the spread of the logits
LOAD_KL = 0.01  # nats between the stream and a stock load, both in the stored dtype; the load rounds its logits to it
LOGITS = 4  # of the probe in float32, alive at once: two sides, and what compares them
KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def self_check(
    folder: Path, step: StepPlan, outcome: Outcome, memory: int, progress: Progress
) -> tuple[dict[str, Any], str]:
    """Check one step's output; SelfCheckError names what differs. `memory`: bytes that a stock load may take.

    Returns what was compared, for the receipt, and apart from it what became of the stock load: how much of it there is
    room for depends on the machine.
    """
    with progress.task("checking the result", 3) as task:
        family = family_of(step.after)
        report = {"stock_keys": _stock_keys(folder, family)}
        task.advance()
        report["streamed_logits"] = _streamed(folder, step, outcome)
        task.advance()
        stock_load = _stock_load(folder, family, step.after, outcome.probe[:1], memory)
        task.advance()
    return report, stock_load


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
    per_layer.check_file(folder, raw)
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


def _stock_load(folder: Path, family: Family, after: Header, ids: torch.Tensor, memory: int) -> str:
    if family.stock is not None:
        return f"left out: stock transformers does not load {family.name}"
    layers = _loadable(family, after, ids, memory)
    if not layers:
        return "left out: not one layer of it fits in the memory that the plan asks for"
    # both in the stored dtype: where activations are rounded (INT8), float32 would be another function
    dtype = TORCH_DTYPES[after.dtype]
    total = family.sizes(after).layers
    with Reader(folder) as reader:
        config = family.shallow(reader.header, range(layers)) if layers < total else reader.header.config
        streamed = open_stream(reader, dtype, config).logits(ids)
    divergence = _divergence(_stock_logits(folder, config, ids, dtype), streamed)
    if not divergence <= (1e-6 if dtype == torch.float32 else LOAD_KL):
        raise SelfCheckError(
            f"{folder.name}: {layers} of {total} layers loaded by stock transformers differ by KL {divergence:.3g} nats"
        )
    return f"{layers} of {total} layers: same distribution"


def _loadable(family: Family, after: Header, ids: torch.Tensor, memory: int) -> int:
    """How many of the first layers a stock load may have: the loader holds what is stored, mapped and copied, and for
    packed linears the weights that it restores."""
    sizes, prefix = family.sizes(after), family.prefix(family.widest(after))
    width, logical = DTYPE_BYTES[after.dtype], format_of(after).logical(after)
    layer = sum(2 * t.nbytes for name, t in after.tensors.items() if name.startswith(prefix))
    layer += sum(width * t.parameters for name, t in logical.items() if name.startswith(prefix))
    rest = sum(2 * t.nbytes for name, t in after.tensors.items() if not name.startswith(family.inside))
    rest += LOGITS * ids.numel() * sizes.vocab * 4
    return max(0, min(sizes.layers, (memory - rest) // layer))


@torch.no_grad()
def _stock_logits(folder: Path, config: Mapping[str, Any], ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kind = stock_class(config, folder)
    with quiet():  # compressed-tensors decompresses at the first forward, with a bar
        model: nn.Module = kind.from_pretrained(
            folder, config=stock_config(config), dtype=dtype, local_files_only=True
        ).eval()
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
