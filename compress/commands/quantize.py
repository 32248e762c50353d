"""`quantize MODEL -o OUT --format F`: write a checkpoint in a smaller number format."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.commands.options import DataFlags, MachineFlags, Model, RunFlags, ScreenFlags, Target, flat
from compress.commands.run import run_one
from compress.steps.quantize.options import QuantizeOptions

EXAMPLE = "autoglm-compress quantize demo:smollm2-135m -o out/int8 --format int8"
Seed = Annotated[
    str,
    typer.Option("--seed", metavar="S", help="Recorded; the formats of today draw nothing.", rich_help_panel="Output"),
]


@flat
def quantize(
    model: Model,
    output: Target,
    options: QuantizeOptions,
    place: RunFlags,
    machine: MachineFlags,
    show: ScreenFlags,
    seed: Seed = "0",
) -> None:
    """Write the decoder's linear layers in a smaller number format."""
    run_one("quantize", model, options, output, DataFlags(seed=seed), place, machine, show)
