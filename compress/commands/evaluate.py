"""`evaluate MODEL`: perplexity, streamed layer by layer, and the distance from a reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from compress.commands.options import DataFlags, MachineFlags, Model, ScreenFlags, flat
from compress.errors import MachineError, UserError

EXAMPLE = "autoglm-compress evaluate out/pruned --reference demo:smollm2-135m --samples 8"
Reference = Annotated[
    str | None, typer.Option("--reference", "-r", metavar="T", help="Also measure the distance from this model.")
]
File = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the numbers as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")]


@flat
def evaluate(
    model: Model,
    data: DataFlags,
    machine: MachineFlags,
    show: ScreenFlags,
    reference: Reference = None,
    output: File = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure perplexity and, against a reference, KL divergence and top-1 agreement."""
    screen, limits = show.screen(), machine.machine()
    spec, seed = data.spec("evaluation"), data.seed_number()
    if output is not None and (output.is_dir() or (output.exists() and not overwrite)):
        raise UserError(f"{output}: exists already", hint="name another file, or give --overwrite to replace a file")
    from compress.checkpoint.source import locate
    from compress.steps.evaluate.run import evaluate as measure

    other = None if reference is None else locate(reference).folder
    with screen:
        folder = locate(model).folder
        found = measure(folder, spec, limits, reference=other, seed=seed, progress=screen.progress)
    if output is not None:
        write_json(output, found)
    screen.evaluation(found, model, reference)


def write_json(path: Path, value: object) -> None:
    """Write whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written ({error.strerror})") from None
