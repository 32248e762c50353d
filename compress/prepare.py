"""What a run checks before its work: where the result may go, what will be done, what it must lie apart from.

Reads headers alone. Torch-free: `--dry-run` ends here.
"""

from __future__ import annotations

from pathlib import Path

from compress.checkpoint.layout import SHARD_BYTES
from compress.data import local_paths
from compress.errors import UserError
from compress.machine import Machine, Progress
from compress.output import check_apart, check_out
from compress.plan import Plan, make_plan
from compress.recipe import Recipe


def prepare(
    recipe: Recipe,
    out: Path,
    machine: Machine,
    *,
    overwrite: bool = False,
    stop_after: int | None = None,
    progress: Progress,
    where: str | None = "recipe",
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """The plan of a run of `recipe` into `out`; nothing is written. Raises what `make_plan` does, and UserError for an
    `out` that cannot be written."""
    check_out(out, overwrite)
    plan = make_plan(recipe, machine, progress=progress, where=where, out=out, shard_bytes=shard_bytes)
    data = recipe.data
    texts = [path for spec in (data.calibration, data.training, data.evaluation) for path in local_paths(spec)]
    check_apart(out, [plan.source, *([plan.teacher] if plan.teacher else [])], texts)
    steps = len(plan.steps)
    if stop_after is not None and not 1 <= stop_after < steps:
        allowed = f"from 1 to {steps - 1}" if steps > 1 else "none: the recipe has one step"
        raise UserError(f"--stop-after: found {stop_after}, allowed: a number of steps {allowed}")
    return plan
