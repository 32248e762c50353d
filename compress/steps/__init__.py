"""What a recipe can say. One folder a step: options.py and plan.py (torch-free), run.py (the work).

A step is `run(job) -> Outcome` and `plan(before, options, context, complain) -> StepPlan | None`; None after at least
one complaint. To add a step: its folder and one entry in `STEPS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from compress.checkpoint.headers import Header
from compress.steps.distill.options import DistillOptions
from compress.steps.distill.plan import plan as plan_distill
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import plan as plan_prune
from compress.steps.quantize.options import QuantizeOptions
from compress.steps.quantize.plan import plan as plan_quantize
from compress.steps.types import Complain, Job, Outcome, PlanContext, StepOptions, StepPlan

Planner = Callable[[Header, StepOptions, PlanContext, Complain], StepPlan | None]


@dataclass(frozen=True)
class Lighter:
    """What makes a step need less memory, in words, and the keys of a recipe that say it; `{step}` is its own."""

    what: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One entry of the table: `data` names the data source its lone command's `--data` stands for; `lighter` is None
    where nothing that a recipe says makes the step need less memory."""

    name: str
    options: type[StepOptions]
    plan: Planner
    data: str
    lighter: Lighter | None = None

    def load(self) -> Callable[[Job], Outcome]:
        """The step's work; imports torch."""
        return cast(Callable[[Job], Outcome], import_module(f"compress.steps.{self.name}.run").run)


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        Step(
            "prune",
            PruneOptions,
            cast(Planner, plan_prune),
            "calibration",
            Lighter("fewer or shorter calibration windows", ("data.calibration.samples", "data.calibration.length")),
        ),
        Step(
            "distill",
            DistillOptions,
            cast(Planner, plan_distill),
            "training",
            Lighter("a smaller batch or shorter training windows", ("{step}.batch", "data.training.length")),
        ),
        Step("quantize", QuantizeOptions, cast(Planner, plan_quantize), "calibration"),
    )
}
