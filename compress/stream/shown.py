"""Calibration windows on their way through a stream's layers: with what their images look like, at their positions."""

from __future__ import annotations

import torch
from torch import nn

from compress.machine import Progress
from compress.stream.forward import Stream
from compress.stream.vision import Sight, show, token_positions


class Shown:
    """Windows `ids` [N, L] for `stream`, whose images and padding `sight` tells.

    lengths [N]: tokens before the padding, which stands at the end. real [N, L] float32: 1 for those and 0 for padding;
    None where nothing is.
    """

    def __init__(self, stream: Stream, ids: torch.Tensor, sight: Sight) -> None:
        self.stream, self.ids, self.sight = stream, ids, sight
        self.real = sight.weights
        whole = torch.full((len(ids),), ids.shape[1])
        self.lengths = whole if self.real is None else (self.real > 0).sum(1)
        self._positions = token_positions(stream, ids, sight.images)

    def begin(self, progress: Progress) -> torch.Tensor:
        """What the first layer gets [N, L, hidden]."""
        hidden = self.stream.embed(self.ids)
        show(self.stream, hidden, self.ids, self.sight.images, progress)
        return hidden

    def advance(self, layer: nn.Module, hidden: torch.Tensor) -> None:
        """Pass hidden states through one layer, in place."""
        self.stream.advance(layer, hidden, positions=self._positions)
