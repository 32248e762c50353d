"""`distill MODEL --teacher T -o OUT`: train a student towards its teacher."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.commands.options import DataFlags, MachineFlags, Model, RunFlags, ScreenFlags, Target, flat
from compress.commands.run import run_one
from compress.steps.distill.options import DistillOptions

EXAMPLE = "autoglm-compress distill out/pruned --teacher demo:smollm2-135m -o out/student"
Teacher = Annotated[
    str, typer.Option("--teacher", "-t", metavar="T", help="The model to learn from.", show_default=False)
]


@flat
def distill(
    model: Model,
    teacher: Teacher,
    output: Target,
    options: DistillOptions,
    data: DataFlags,
    place: RunFlags,
    machine: MachineFlags,
    show: ScreenFlags,
) -> None:
    """Train the model to give its teacher's next-token distribution."""
    run_one("distill", model, options, output, data, place, machine, show, teacher=teacher)
