"""Statistics of a layer's inner activations, gathered by hooks while windows pass through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Gram:
    """H = X^T X / T of the inputs X [T, n] of one Linear, float32 [n, n] on `device`, summed batch by batch."""

    def __init__(self, width: int, device: str = "cpu") -> None:
        self._sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [..., n]. The product is taken in float32: in bfloat16 it would come out rounded."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._sum.addmm_(flat.T, flat)
        self.tokens += len(flat)

    def mean(self) -> torch.Tensor:
        """H [n, n]; the sum is scaled in place, so call it once, when all is added."""
        scaled = self._sum.div_(max(self.tokens, 1))
        self.tokens = 1
        return scaled


@contextmanager
def gathering(layer: nn.Module, grams: Mapping[str, Gram]) -> Iterator[None]:
    """While open, the inputs of the named Linears of `layer` are added to their Grams."""

    def hook(gram: Gram):  # type: ignore[no-untyped-def]
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            del module
            gram.add(args[0])

        return add

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(gram)) for name, gram in grams.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
