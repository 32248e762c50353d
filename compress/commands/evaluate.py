"""`evaluate MODEL`: perplexity, streamed layer by layer, and the distance from a reference."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.options import DataFlags, MachineFlags, Model, ScreenFlags, flat
from compress.errors import MachineError, UserError
from compress.output import check_takes

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
    machine.note(screen)
    spec, seed = data.spec("evaluation"), data.seed_number()
    if output is not None:
        check_writable(output, overwrite)
    from compress.api import evaluate as measure

    with screen:
        found = measure(model, reference=reference, data=spec, seed=seed, machine=limits, progress=screen.progress)
    try:
        if output is not None:
            write_json(output, found)
    except MachineError as full:
        screen.evaluation(found, model, reference, full)  # the numbers are not lost with the file
        raise
    screen.evaluation(found, model, reference)


def check_writable(path: Path, overwrite: bool) -> None:
    """Refuse, before the work, a FILE that exists or that its folder will not take. Leaves nothing behind."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: exists already and is a folder", hint="name a file in it")
        if path.exists() and not overwrite:
            raise UserError(f"{path}: exists already", hint="name another file, or give --overwrite to replace it")
        check_takes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write whole or not at all; what JSON has no number for (infinity) is null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    write_text(path, json.dumps(plain, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all; MachineError when the disk will not take it."""
    partial = path.with_name(f".{path.name[:100]}-{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("x", encoding="utf-8") as file:
                file.write(text)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror})") from None
