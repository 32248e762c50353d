"""What the plan says about token weights: kinds that do not occur, kinds that nobody named, weights without use."""

from __future__ import annotations

from compress.criteria import CRITERIA
from compress.data import DataSpec, occurring
from compress.errors import MachineError, UserError
from compress.steps.prune.options import ALIGNED, PruneOptions
from compress.steps.types import Complain
from compress.stream import GRADIENTS, WHOLE


def weight_notes(options: PruneOptions, data: DataSpec, ranked: bool, kv: bool, complain: Complain) -> list[str]:
    """One line on what the tokens weigh, where that is not the same; complaints about what cannot be. `ranked`: whether
    units go, and not whole layers alone; `kv`: whether KV heads do."""
    shares = options.token_shares
    if shares is None and options.token_weights == "none":
        return []
    given = options.from_sensitivity is not None
    needs = frozenset() if given else CRITERIA[options.criterion].needs
    weighed = options.refit or (kv and options.kv_merge == ALIGNED) or bool(ranked and needs - GRADIENTS - WHOLE)
    key = "token_weights" if shares is None else "token_shares"
    if not (ranked or kv):
        complain(key, "weighs nothing: no units go, and layers are chosen with all tokens alike")
        return []
    if not weighed:
        by = "a ranking from a folder" if given else options.criterion if ranked else f"kv_merge: {options.kv_merge}"
        complain(key, f"weighs nothing: {by} without refit gathers no statistics of the tokens")
        return []
    notes = ["tokens weigh 1 / mean square of the residual stream"] if options.token_weights == "norm" else []
    if given or needs & (GRADIENTS | WHOLE):
        notes.append("token weights count in the refit alone: the ranking is made without them")
    if shares is None:
        return notes
    try:
        found = occurring(data, "calibration")
    except (UserError, MachineError):
        return []  # what is wrong with the data is told where data are checked
    for name in sorted(name for name, share in shares.items() if share and name not in found):
        complain("token_shares", f"the calibration data have no {name} tokens, but {', '.join(sorted(found))}")
    for name in sorted(found - shares.keys()):
        complain("token_shares", f"the calibration data have {name} tokens, whose share is not told", f"give {name}=0")
    total = sum(shares.values())
    told = ", ".join(f"{name} {share / total:.3g}" for name, share in shares.items())
    return [*notes, f"shares of the tokens' weight: {told}"]
