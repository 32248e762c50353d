"""`sensitivity MODEL -o DIR`: what every head, KV group and neuron costs; and what such folders say."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.checkpoint.disk import disk_errors
from compress.commands.options import (
    DataFlags,
    MachineFlags,
    PlaceFlags,
    ScreenFlags,
    flag,
    flat,
    told_what_is_kept,
)
from compress.curves import DOCUMENT
from compress.errors import MachineError, UserError
from compress.limits import ENOUGH
from compress.report import Screen
from compress.steps.prune.measuring import SensitivityOptions

EXAMPLE = "autoglm-compress sensitivity demo:smollm2-135m -o out/sensitivity"
_OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}
_READ: dict[str, Any] = {"rich_help_panel": "Reading"}
Measured = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A model to measure, as for prune; or, without -o, a folder to show.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False, **_OUTPUT)
]
Against = Annotated[
    list[Path] | None,
    typer.Option(
        "--against",
        metavar="RESULT",
        help="Show a folder's prediction for this pruned result beside what its receipt measured; may be repeated.",
        **_READ,
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--compare", metavar="A B", help="Compare the rankings of two folders.", show_default=False, **_READ),
]
Cut = Annotated[
    str | None,
    typer.Option("--cut", metavar="X", help="Share removed, at which --compare counts moved units; 0.25.", **_READ),
]


@flat
def sensitivity(
    options: SensitivityOptions,
    data: DataFlags,
    place: PlaceFlags,
    machine: MachineFlags,
    show: ScreenFlags,
    model: Measured = None,
    output: Out = None,
    against: Against = None,
    compare: Compare = None,
    cut: Cut = None,
) -> None:
    """Measure what every head, KV group and neuron costs, and what cuts will do to the loss."""
    screen = show.screen()
    if sum((compare is not None, bool(against), output is not None)) > 1 or (compare is None) == (model is None):
        raise UserError(
            "found other arguments than these, allowed: MODEL -o OUT, DIR, DIR --against RESULT, or --compare A B"
        )
    if output is None and (unused := _measuring(options, data, place, machine)):
        raise UserError(f"{unused[0]}: says how a model is measured, and nothing is", hint="give MODEL -o OUT")
    if compare is None and cut is not None:
        raise UserError("--cut: says at which share --compare counts moved units, and nothing is compared")
    if compare is not None:
        _compare(screen, *compare, "0.25" if cut is None else cut)
    elif output is not None:
        assert model is not None
        limits = machine.machine()
        machine.note(screen)
        from compress.api import measure_sensitivity

        with told_what_is_kept(), screen:
            if (Path(str(model)) / DOCUMENT).is_file():
                raise UserError(f"{model}: a folder of scores, not a model", hint="leave out -o to show it")
            found = measure_sensitivity(
                model,
                output,
                data=data.spec("calibration"),
                seed=data.seed_number(),
                machine=limits,
                progress=screen.progress,
                **place.arguments(),
                **options.model_dump(),
            )
        _show(screen, found, output)
    else:
        from compress.sensitivity import load_sensitivity

        folder = Path(str(model)).expanduser()
        if not folder.is_dir():
            raise UserError(f"{model}: no folder to show", hint="give -o OUT to measure a model")
        if (folder / "config.json").is_file() and not (folder / "sensitivity").is_dir():
            raise UserError(f"{model}: a model, not a folder of scores", hint="give -o OUT to measure it")
        found = load_sensitivity(folder)
        if against:
            _against(screen, found, folder, against, pictures=options.pictures)
        else:
            _show(screen, found, folder)


def _measuring(options: SensitivityOptions, *groups: DataFlags | PlaceFlags | MachineFlags) -> list[str]:
    """The flags given that say how, or where to, a model is measured."""
    given = sorted(options.model_fields_set - {"pictures"})
    given += [each.name for group in groups for each in fields(group) if getattr(group, each.name) != each.default]
    return [flag(name) for name in given]


def _show(screen: Screen, found: Any, folder: Path) -> None:
    from compress.sensitivity.heat import heat_map, summary

    screen.said({"folder": str(folder), **found.about}, *heat_map(found), *summary(found, folder), result=True)


def _against(screen: Screen, found: Any, folder: Path, results: list[Path], pictures: bool) -> None:
    """Predicted beside measured: a table, and a picture in the folder."""
    from compress.sensitivity.outcome import outcome

    rows = [outcome(found, result) for result in results]
    few = found.measured.tokens_per_column if found.measured is not None else ENOUGH
    said = [f"predicted from {few:.1f} calibration tokens per column, under {ENOUGH}: it means little"] * (few < ENOUGH)
    plain = f"the prediction is of {found.criterion} and a plain refit at damping {found.about['damping']:g}"
    failed = None
    if pictures:
        try:
            with disk_errors(folder / "pictures"):
                said.append(f"picture: {found.save_predicted(rows, folder / 'pictures')[0]}")
        except MachineError as problem:  # the table is told all the same
            failed = MachineError(problem.message, hint="--no-pictures leaves it at the table")
    screen.rows(
        [vars(row) for row in rows],
        ("result", "predicted", "measured", "KL"),
        [[row.name, row.told(), f"{row.measured:.4f}", f"{row.kl:.4f}"] for row in rows],
        "rise of the loss over the dense model, nats a token; KL: how far its distribution moved, which no luck hides",
        *["at least: more went than was measured"] * any(row.at_least for row in rows),
        *(f"{row.name} was pruned with {row.otherwise}: {plain}" for row in rows if row.otherwise),
        *said,
        failed=failed,
    )
    if failed is not None:
        raise failed


def _compare(screen: Screen, first: Path, second: Path, cut: str) -> None:
    """A row a layer and group."""
    from compress.sensitivity import load_sensitivity
    from compress.sensitivity.compare import compare, mean_by_group

    try:
        share = float(cut)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"--cut: found '{cut}', allowed: a number above 0 and below 1")
    rows = compare(load_sensitivity(first), load_sensitivity(second), share)
    groups = mean_by_group(rows)
    screen.rows(
        {"first": str(first), "second": str(second), "cut": share, "groups": groups, "rows": rows},
        ("layer", "group", "spearman", "gone", "moved"),
        [[str(r["layer"]), r["group"], f"{r['spearman']:.3f}", str(r["gone"]), str(r["moved"])] for r in rows],
        *(
            f"{each['group']}: mean rank correlation {each['spearman']:.3f}; "
            f"{each['moved']} of {each['gone']} units that go are others"
            for each in groups
        ),
    )
