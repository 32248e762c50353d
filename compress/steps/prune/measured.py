"""A ranking and cost curves from a sensitivity folder, in the place of a criterion's own. From headers and that folder.

The folder must be of the very model that the step cuts: its digest says so, and reads the weights at most once (they
are remembered, checkpoint/digests.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint.digests import model_digest
from compress.checkpoint.headers import Header
from compress.criteria import CRITERIA
from compress.curves import Curves, read_curves
from compress.errors import MachineError, UserError
from compress.limits import ENOUGH
from compress.steps.prune.allocate import uncovered
from compress.steps.prune.decoder import Decoder, Keeps, Layer
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.widths import WHOLE
from compress.steps.types import Complain

KEY = "from_sensitivity"


def measured(
    before: Header, layers: Sequence[Layer], going: bool, options: PruneOptions, complain: Complain
) -> Curves | None:
    """The folder that `from_sensitivity` names; None after a complaint: the folder cannot be read, is of another model,
    lacks a group, or was ranked by another criterion than the step asks for. `going`: whether layers or KV heads go."""
    assert options.from_sensitivity is not None
    for key in WHOLE if going else ():
        if getattr(options, key) is not None:
            complain(KEY, f"not with '{key}': the folder ranks units of whole layers, and predicts no such cut")
            return None
    if not before.locations:
        complain(KEY, "an earlier step changes the model that was measured; prune first")
        return None
    try:
        found = read_curves(Path(options.from_sensitivity).expanduser())
        source = next(iter(before.locations.values())).file.parent
        same = found.model == model_digest(source)
    except (UserError, MachineError) as problem:
        complain(KEY, problem.message, problem.hint)
        return None
    wrong = None if same else "is of another model (the digests of config.json and weights differ)"
    known = None if found.criterion in CRITERIA else f"is ranked by {found.criterion}, which this version does not know"
    wrong = wrong or known or _lacking(found, layers)
    if "criterion" in options.model_fields_set and options.criterion != found.criterion:
        complain(
            "criterion",
            f"the units of {options.from_sensitivity} are ranked by {found.criterion}, found {options.criterion}",
        )
        return None
    if wrong:
        complain(KEY, f"{options.from_sensitivity} {wrong}", "measure this model: autoglm-compress sensitivity")
        return None
    return found


def predicted_loss(found: Curves, layers: Sequence[Layer], keep: Keeps) -> float:
    """Rise of the loss, nats a token: the curves' sum over all layers and groups that lose units."""
    return sum(
        found.curves[index, name].at(group.units - each[name])
        for index, (layer, each) in enumerate(zip(layers, keep, strict=True))
        for name, group in layer.groups.items()
        if each[name] < group.units
    )


def measured_notes(found: Curves, decoder: Decoder, keep: Keeps, options: PruneOptions) -> list[str]:
    """By what units are ranked, and what that predicts; the least of it, where a curve ends before the cut does."""
    loss, beyond = predicted_loss(found, decoder.layers, keep), uncovered(keep, decoder, found.curves)
    times = math.exp(min(loss, 700))
    least = "" if beyond is None else f", at least: layer {beyond[0]} loses more {beyond[1]} units than were measured"
    poor = ""
    if (few := found.tokens_per_column) < ENOUGH:
        poor = f"; measured on {few:.1f} calibration tokens per column, under {ENOUGH}: it means little"
    told = f"{loss:.4f} nats a token (perplexity {times:.4g} times the dense one){least}{poor}"
    if not decoder.removed(keep):
        return [f"{found.folder} predicts nothing: no units of the decoder go"]
    damping = float(found.about["damping"])
    given = other_refit(options, damping)
    plain = f"; that is with a plain refit at damping {damping:g}, not with {' and '.join(given)}" if given else ""
    tower = "; what the cut of the vision tower adds is not in it" if decoder.beside else ""
    return [
        f"units are ranked by {found.criterion}, as {found.folder} has them",
        f"predicted rise of the loss: {told}{plain}{tower}",
    ]


def other_refit(options: PruneOptions, damping: float) -> list[str]:
    """The options that make the refit another one than curves are measured with: a plain one at `damping`."""
    other = {
        "refit": None if options.refit else "false",
        "damping": None if options.damping == damping or not options.refit else f"{options.damping:g}",
        "held_out": None if options.held_out is None else f"{options.held_out:g}",
        "joint_refit": options.joint_refit or None,
        "error_propagation": f"{options.error_propagation:g}" if options.error_propagation else None,
        "token_weights": None if options.token_weights == "none" else options.token_weights,
        "token_shares": options.token_shares,
    }
    return [f"{key}: {value}" for key, value in other.items() if value is not None]


def receipt(found: Curves, loss: float) -> Mapping[str, Any]:
    """What a receipt says of the folder and of what it predicts."""
    return {
        "sensitivity": {"digest": found.digest, "criterion": found.criterion, "damping": found.about["damping"]},
        "predicted_loss": loss,
    }


def _lacking(found: Curves, layers: Sequence[Layer]) -> str | None:
    if found.layers != len(layers):
        return f"has {found.layers} layers, the model {len(layers)}"
    for index, layer in enumerate(layers):
        for name, group in layer.groups.items():
            if name not in found.groups or found.groups[name].units[index] != group.units:
                return f"was not measured for the {group.units} {name} of layer {index}"
    return None
