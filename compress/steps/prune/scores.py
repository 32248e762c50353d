"""What was chosen in every layer and what it cost: as the files beside the result, and as the state of a run.

`importance.safetensors` holds `layers.N.GROUP.{cost,order,keep}`; importance.json says how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.checkpoint.per_layer import one_or_each
from compress.criteria import CRITERIA, Ranking
from compress.steps.prune.decoder import layers_of
from compress.steps.prune.depth import Depth
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.steps.types import Job

JOINT = "error_reader_alone"


@dataclass(frozen=True)
class Errors:
    """Relative output errors of one group of one layer on the calibration inputs: as written, and without the refit;
    None when no Gram matrix was taken, because neither criterion nor refit needed one. `error_held_out`: of a refit
    made without the held-out windows, on them, with the `damping` that was best there. `damping` is None without refit.
    `error_reader_alone`: with the reader refitted, before the joint refit of the whole FFN; only where there was one.
    """

    error: float | None
    error_without_refit: float | None
    error_held_out: float | None
    damping: float | None
    error_reader_alone: float | None = None

    def document(self) -> dict[str, float | None]:
        """As the receipt has it."""
        said: dict[str, float | None] = asdict(self)
        return said if self.error_reader_alone is not None else {k: v for k, v in said.items() if k != JOINT}


@dataclass(frozen=True)
class Chosen:
    """What happened to one group of one layer."""

    ranking: Ranking
    keep: torch.Tensor
    errors: Errors


Layers = Sequence[Mapping[str, Chosen]]  # one map of groups a layer


def tensors(chosen: Layers) -> dict[str, torch.Tensor]:
    """`layers.N.GROUP.{cost,order,keep}`: float32 and int32."""
    found: dict[str, torch.Tensor] = {}
    for index, groups in enumerate(chosen):
        for name, one in groups.items():
            prefix = f"layers.{index}.{name}"
            found[f"{prefix}.cost"] = one.ranking.cost.to(torch.float32).contiguous()
            found[f"{prefix}.order"] = one.ranking.order.to(torch.int32)
            found[f"{prefix}.keep"] = one.keep.to(torch.int32)
    return found


def errors(chosen: Layers) -> list[dict[str, Any]]:
    """The errors of every layer, by group."""
    return [{name: one.errors.document() for name, one in groups.items()} for groups in chosen]


def restored(found: Mapping[str, torch.Tensor], said: Sequence[Mapping[str, Any]]) -> list[dict[str, Chosen]]:
    """What `tensors` and `errors` were made from."""
    return [
        {name: _restored(found, f"layers.{index}.{name}", errors) for name, errors in groups.items()}
        for index, groups in enumerate(said)
    ]


def _restored(found: Mapping[str, torch.Tensor], prefix: str, said: Mapping[str, Any]) -> Chosen:
    ranking = Ranking(found[f"{prefix}.order"].long(), found[f"{prefix}.cost"])
    return Chosen(ranking, found[f"{prefix}.keep"].long(), Errors(**said))


def document(
    job: Job, plan: PrunePlan, options: PruneOptions, chosen: Layers, digest: str, depth: Depth | None
) -> dict[str, Any]:
    """importance.json. `digest`: of the calibration text; `depth`: which layers stayed. One that went has no groups."""
    layers = [layer.groups for layer in layers_of(plan.before, job.family)]
    groups = {
        name: {
            "units": one_or_each([groups[name].units for groups in layers]),
            "keep": one_or_each([keep[name] for keep in plan.keep]),
            "balance": one_or_each([groups[name].balance for groups in layers]),
        }
        for name in layers[0]
    }
    return {
        "criterion": plan.criterion,
        "paper": CRITERIA[plan.criterion].paper,
        "damping": options.damping,
        "refit": options.refit,
        "calibration_sha256": digest,
        "groups": groups,
        **({} if depth is None else {"depth": depth.document()}),
        "layers": [{"layer": index, "groups": said} for index, said in enumerate(errors(chosen))],
    }
