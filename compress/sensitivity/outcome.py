"""Predicted beside measured: what an analysis says of a pruned result, and what its receipt measured. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress.checkpoint.digests import digest_of
from compress.checkpoint.headers import read_json
from compress.curves import DOCUMENT
from compress.errors import UserError
from compress.steps.prune.measured import other_refit
from compress.steps.prune.options import PruneOptions

if TYPE_CHECKING:
    from compress.curves import Curves
    from compress.sensitivity import Sensitivity

UNSEEN = {"layers": "whole layers", "kv_heads": "KV heads", "vision": "the vision tower"}  # as a receipt tells them


@dataclass(frozen=True)
class Outcome:
    """A pruned result by its folder's name; rises of the loss over the dense model, nats a token, and the mean KL from
    it. `at_least`: more units went than curves were measured for. `otherwise`: the options that the prediction is
    not of."""

    name: str
    predicted: float
    measured: float
    kl: float
    at_least: bool = False
    otherwise: str = ""

    def told(self) -> str:
        """The prediction, with `at least` where it is that."""
        return f"{'at least ' if self.at_least else ''}{self.predicted:.4f}"


def outcome(found: Sensitivity, result: Path) -> Outcome:
    """What `found` predicts of the prune step in `result`, and what was measured after it.

    Raises UserError where `result` has no receipt, starts from another model, lost more than the units that were
    measured (UNSEEN), or was not measured before and after its prune step, which must be the first step.
    """
    measured = found.curves_measured()
    path = result / "receipt.json"
    if (result / DOCUMENT).is_file():
        raise UserError(f"{result}: an analysis, not a pruned model", hint="--compare A B compares two of them")
    receipt = read_json(path)
    try:
        files = receipt["model"]["sha256"]
        first, stages = receipt["steps"][0], {stage["stage"]: stage for stage in receipt["stages"]}
        keep = first.get("keep")
        before, after = stages.get("dense"), stages.get(first["step"])
        losses = None if before is None or after is None else (before["perplexity"], after["perplexity"], after["kl"])
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{path}: not a receipt of a run with steps") from None
    if not isinstance(keep, dict):
        raise UserError(f"{path}: its first step is no prune step")
    if unseen := [what for key, what in UNSEEN.items() if key in first or key in keep]:
        raise UserError(f"{path}: its prune step cut {' and '.join(unseen)} too, which {found.step} does not predict")
    if not isinstance(files, dict) or digest_of(files) != found.about.get("model", {}).get("digest"):
        raise UserError(f"{path}: made from another model than {found.step} measured")
    if losses is None:
        raise UserError(
            f"{path}: not measured before and after its prune step",
            hint=f"autoglm-compress run {result / 'recipe.yaml'} --set evaluate=each -o OUT measures it",
        )
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in losses) or min(losses[:2]) <= 0:
        raise UserError(f"{path}: it measured no finite loss; nothing can be compared with the prediction")
    rise = math.log(losses[1]) - math.log(losses[0])
    ends = found.ends_before(keep)
    return Outcome(result.name, found.predicted(keep), rise, losses[2], ends, _otherwise(measured, receipt))


def _otherwise(measured: Curves, receipt: Mapping[str, Any]) -> str:
    """What the curves do not know: another ranking, another refit or none."""
    try:
        step = receipt["steps"][0]
        options = PruneOptions.model_validate(receipt["recipe"]["steps"][0]["options"])
        same, by = options.criterion == measured.criterion, f"criterion: {options.criterion}"
        if options.from_sensitivity is not None:
            other = step["sensitivity"]
            same, by = other["digest"] == measured.digest, f"from_sensitivity: another folder, by {other['criterion']}"
    except (KeyError, IndexError, TypeError, ValidationError):
        return ""  # another version's options: what they did is not known here
    refit = other_refit(options, float(measured.about["damping"]))
    return " and ".join([*([] if same else [by]), *refit])
