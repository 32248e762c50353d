"""What final hidden states say of the tokens that follow: log-probabilities, and the loss of a text.

Logits in float32 over the whole vocabulary are alive for HEAD_TOKENS positions at a time.
"""

from __future__ import annotations

import torch

from compress.errors import UserError
from compress.limits import HEAD_TOKENS
from compress.stream.forward import Stream


def log_probabilities(stream: Stream, normed: torch.Tensor) -> torch.Tensor:
    """Of the next token [T, vocab], float32 on the stream's device, for normed hidden states [T, hidden]."""
    return stream.head_logits(normed[None])[0].log_softmax(-1)


@torch.no_grad()
def mean_loss(stream: Stream, normed: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor | None = None) -> float:
    """Nats a token: the mean of -log p(next token) over the windows `ids` [N, L], L at least 2, all positions but each
    window's last. `normed` [N, L, hidden]: the final hidden states, after the last norm. `counted` [N, L] bool: the
    tokens that are predicted, None: all; UserError where none is."""
    following, seen = ids[:, 1:].flatten(), normed[:, :-1].flatten(0, 1)
    if counted is not None:
        mine = counted[:, 1:].flatten()
        following, seen = following[mine], seen[mine]
        if not len(seen):
            raise UserError("no token of these windows is predicted: they are images and padding")
    total = 0.0
    for start in range(0, len(seen), HEAD_TOKENS):
        log_p = log_probabilities(stream, seen[start : start + HEAD_TOKENS])
        target = following[start : start + HEAD_TOKENS, None].to(log_p.device)
        total -= float(log_p.gather(1, target).sum(dtype=torch.float64))
    return total / len(seen)
