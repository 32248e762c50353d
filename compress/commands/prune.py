"""`prune MODEL -o OUT`: remove query heads and FFN neurons."""

from __future__ import annotations

from compress.commands.options import DataFlags, MachineFlags, Model, RunFlags, ScreenFlags, Target, flat
from compress.commands.run import run_one
from compress.steps.prune.options import PruneOptions

EXAMPLE = "autoglm-compress prune demo:smollm2-135m -o out/pruned --ratio 0.2"


@flat
def prune(
    model: Model,
    output: Target,
    options: PruneOptions,
    data: DataFlags,
    place: RunFlags,
    machine: MachineFlags,
    show: ScreenFlags,
) -> None:
    """Remove query heads, FFN neurons and decoder layers, and refit what reads them."""
    run_one("prune", model, options, output, data, place, machine, show)
