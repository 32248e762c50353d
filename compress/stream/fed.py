"""Windows on their way into a decoder layer: their hidden states, and what goes with them, cut into parts together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compress.limits import BATCH_TOKENS


@dataclass(frozen=True)
class Fed:
    """hidden [N, L, hidden]; weights [N, L] float32 of the tokens, None: all the same; positions [3, N, L] of the
    tokens (stream/vision.py), None: those of text."""

    hidden: torch.Tensor
    weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def part(self, start: int, stop: int) -> Fed:
        """Windows [start, stop): views."""
        return Fed(
            self.hidden[start:stop],
            None if self.weights is None else self.weights[start:stop],
            None if self.positions is None else self.positions[:, start:stop],
        )

    def batches(self) -> Iterator[Fed]:
        """Batches of windows, as large as a stream takes them."""
        batch = max(1, BATCH_TOKENS // self.hidden.shape[1])
        for start in range(0, len(self), batch):
            yield self.part(start, start + batch)

    def weights_on(self, device: str) -> torch.Tensor | None:
        """The weights where the layer is."""
        return None if self.weights is None else self.weights.to(device)
