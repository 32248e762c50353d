"""What calibration tokens weigh in the statistics of a layer: all the same, by the residual stream, by their kind.

Weights are made anew from tokens and hidden states where they are needed, so a resumed run has the same ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from compress.data import PADDING, TOKEN_KINDS, Tokens
from compress.errors import UserError
from compress.limits import BATCH_TOKENS, ENOUGH
from compress.steps.prune.enough import few_tokens
from compress.steps.prune.options import PruneOptions
from compress.stream.fed import Fed

FLOOR = 1e-6  # of the median mean square: a token that is all zeros does not outweigh the rest


class TokenWeights:
    """Weights [N, L] float32 for windows whose tokens are of the `kinds` [N, L], None: nobody told them apart.

    Padding weighs nothing. With `token_weights: norm` a token weighs 1 / mean_i h_i^2, h [hidden] the residual stream
    that goes into the layer: errors then count in proportion to what they are added to, as the next norm sees them.
    With `token_shares` the tokens of a kind are then scaled together, so that each kind has its share of the sum.
    UserError for a kind with a share of which the windows hold no token.
    """

    def __init__(self, options: PruneOptions, kinds: npt.NDArray[np.int8] | None) -> None:
        self._norm = options.token_weights == "norm"
        self._kinds = None if kinds is None else torch.from_numpy(kinds)
        told = options.token_shares or {}
        largest = max(told.values(), default=0.0) or 1.0
        self._shares = {TOKEN_KINDS.index(name): share / largest for name, share in told.items()}
        for kind, share in self._shares.items():
            if share and (self._kinds is None or not bool((self._kinds == kind).any())):
                raise UserError(f"token_shares: no token of the calibration windows is of the kind {TOKEN_KINDS[kind]}")

    @property
    def _equal(self) -> bool:
        """Whether every token weighs the same."""
        padded = self._kinds is not None and bool((self._kinds == PADDING).any())
        return not (self._norm or self._shares or padded)

    def of(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """What each token weighs before a layer that gets `hidden` [N, L, hidden]; their mean is 1. None: the same."""
        if self._equal:
            return None
        found = _inverse_square(hidden) if self._norm else torch.ones(hidden.shape[:2])
        if self._kinds is not None:
            found[self._kinds == PADDING] = 0
            for kind, share in self._shares.items():
                mine = self._kinds == kind
                found[mine] *= share / max(float(found[mine].sum(dtype=torch.float64)), 1e-30)
        return found.mul_(found.numel() / float(found.sum(dtype=torch.float64)))


def _inverse_square(hidden: torch.Tensor) -> torch.Tensor:
    """1 / mean square [N, L] float32 of hidden states [N, L, hidden]."""
    found = torch.empty(hidden.shape[:2])
    batch = max(1, BATCH_TOKENS // hidden.shape[1])
    for start in range(0, len(hidden), batch):
        found[start : start + batch] = hidden[start : start + batch].float().square().mean(-1)
    return found.clamp_min(FLOOR * float(found.median())).clamp_min(1e-30).reciprocal()


def check_tokens(tokens: Tokens, planned: bool, columns: int, options: PruneOptions) -> str | None:
    """How many tokens there are for each of the `columns` of the widest Gram matrix, in words, where a plan has not
    counted them, as it does whole windows of a given number (`planned`): all of a text, or such as weigh nothing.
    UserError where they are fewer than columns, unless forced."""
    shares = options.token_shares or {}
    silent = [PADDING, *(TOKEN_KINDS.index(name) for name, share in shares.items() if not share)]
    left_out = 0 if tokens.kinds is None else int(np.isin(tokens.kinds, silent).sum())
    if planned and not left_out:
        return None
    besides = "" if not left_out else " besides padding" if len(silent) == 1 else " that weigh something"
    count = int(tokens.ids.size) - left_out
    if not options.force and (few := few_tokens(count, columns, besides)) is not None:
        raise few
    poor = f" (under {ENOUGH}: the refit will be poor; give more text)" if count < ENOUGH * columns else ""
    return f"{count} tokens{besides}, {count / columns:.1f} per column{poor}"


def held_share(fed: Fed, back: int) -> float:
    """The share of all weight that the last `back` windows have; UserError where it is none, or all."""
    if fed.weights is None or not back:
        return back / len(fed)
    share = float(fed.weights[-back:].sum(dtype=torch.float64) / fed.weights.sum(dtype=torch.float64))
    if not 0 < share < 1:
        raise UserError(
            f"held_out: the {back} windows that are held back have {'all' if share else 'none'} of the tokens' weight",
            hint="more samples, or other token_shares",
        )
    return share
