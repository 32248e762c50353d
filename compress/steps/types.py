"""What every step shares: the plan it makes, the job it is given, the outcome it reports. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema

from compress.arch import Family
from compress.checkpoint.headers import Header
from compress.checkpoint.layout import SHARD_BYTES
from compress.data import DataSpec
from compress.errors import did_you_mean
from compress.machine import Machine, Progress

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.ledger import Ledger


class StepOptions(BaseModel):
    """Base of a step's options: frozen, unknown keys refused. Field descriptions are the command's help."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def one_of(what: str, names: Iterable[str]) -> tuple[AfterValidator, WithJsonSchema]:
    """Annotations of a str option that takes one name of a table: `Annotated[str, *one_of("criterion", CRITERIA)]`."""
    known = tuple(names)

    def check(found: str) -> str:
        if found not in known:
            raise ValueError(f"unknown {what} '{found}'{did_you_mean(found, known)}")
        return found

    return AfterValidator(check), WithJsonSchema({"type": "string", "enum": list(known)})


class Complain(Protocol):
    """Collects one complaint: the option at fault (`"ratio"`, or "" for the step), what is wrong, a hint."""

    def __call__(self, key: str, message: str, hint: str | None = None) -> None: ...


@dataclass(frozen=True)
class PlanContext:
    """What a step's planner may look at besides the header of its input."""

    data: Mapping[str, DataSpec]  # calibration, training, evaluation
    teacher: Header | None  # the distillation teacher's header; None when the plan has no distil step
    threads: int
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class StepPlan:
    """One step, planned from headers alone: the checkpoint before and after, its cost, and why.

    `parameters` counts the model's parameters after the step (quantized or not); `nbytes` all shard files written;
    `memory` the estimated peak above interpreter and libraries; `scratch` the disk that its saved states take while it
    runs; `notes` are decisions with their reasons. `made_with`: digests of other folders that the step's bytes depend
    on, by the option that names them.
    """

    kind: str
    options: StepOptions
    before: Header
    after: Header
    parameters: int
    nbytes: int
    memory: int
    scratch: int = 0
    notes: tuple[str, ...] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What a step's `run` gets. `target` does not exist yet: the step writes it through `Writer`, whole or not."""

    plan: StepPlan
    family: Family  # of the step's input; a step may write another (family_of(plan.after))
    source: Path
    target: Path
    teacher: Path | None
    data: Mapping[str, DataSpec]
    seed: int
    machine: Machine
    progress: Progress
    shard_bytes: int = SHARD_BYTES
    name: str = ""  # of the step in its run, as in `1-prune`; "": the target's
    ledger: Ledger | None = None  # where the step keeps what it has finished; None: it starts over when killed
    pack: StepPlan | None = None  # a quantize step that follows and is done in the same pass; `target` is its output


@dataclass(frozen=True)
class Outcome:
    """What a step reports: its deterministic part of the receipt, and what the self-check expects of the result.

    `probe` holds token ids [B, L] and `logits` [B, L, vocab] (float32) that the written folder must give for them.
    """

    receipt: dict[str, Any]
    probe: torch.Tensor
    logits: torch.Tensor
    measured: dict[str, Any] = field(default_factory=dict)
    packed: tuple[dict[str, Any], ...] = ()  # the receipt of the quantize step that was done in the same pass
