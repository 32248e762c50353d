"""Error propagation: the refit of an FFN makes good a part of what the layers before it have lost.

The refit aims at what the whole layer gives for what it gets, and that comes from pruned layers. With error
propagation its aim is moved from there towards what the layer gave in the dense model: of the FFN of a layer l,

    y_t = F(x_t) + a (l(h_t) - l(h'_t)),

F(x_t) what its whole FFN gives, h'_t what goes into the layer behind pruned layers, h_t in the dense model, and a from
0 to 1 how far (after Arai & Ichikawa 2025, QEP, arXiv:2504.09629, who let the error of quantized inputs pass into one
Linear; here that of the whole residual stream). For it the dense model's hidden states pass beside the pruned one's.
Where the layer adds what its FFN gives through a norm N(y) = g * y / rms(y), what is wanted behind it is e_t, and in
front of it rms(F(x_t)) e_t / g, with a floor under g: the Jacobian of N inverted, but for the one direction in which y
only grows and N does not see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.arch import Group
from compress.arch.layer import norm_behind_ffn
from compress.solve import Shift
from compress.steps.prune.gauss_newton import Seen
from compress.stream.calls import listens
from compress.stream.fed import Fed
from compress.stream.forward import Stream, check_numbers
from compress.stream.statistics import Product

FLOOR = 1e-2  # of the mean square of a norm's gains, under them: what hardly passes one is hardly wanted


class Dense:
    """The dense decoder's hidden states [N, L, hidden], taken through its layers beside the pruned one's; it is shown
    the same images. positions: of the tokens (stream/vision.py); done: layers that they have passed."""

    def __init__(self, stream: Stream, hidden: torch.Tensor, positions: torch.Tensor | None, done: int) -> None:
        self._stream, self.hidden, self._positions, self._done = stream, hidden, positions, done

    def behind(self, index: int) -> torch.Tensor:
        """The states behind layer `index`, which are these from now on; those between pass through as well."""
        for own in range(self._done, index + 1):
            with self._stream.layer(own) as layer:
                self._stream.advance(layer, self.hidden, positions=self._positions)
            check_numbers(self.hidden, own)
        self._done = index + 1
        return self.hidden


class Shifting:
    """While `watching`, finds the `Shift` of an FFN; adds it to the outputs that `seen` keeps, where there is one.

    `dense` [N, L, hidden]: what the layer gave in the dense model; `share`: a.
    """

    def __init__(self, fed: Fed, dense: torch.Tensor, share: float, group: Group, device: str) -> None:
        self._fed, self._dense, self._share, self._group = fed, dense, share, group
        self._sum = Product(dense.shape[-1], group.units, device)

    @contextmanager
    def watching(self, layer: nn.Module, seen: Seen | None) -> Iterator[None]:
        """While open, all windows pass through `layer`, in their order; after the hooks that fill `seen`."""
        passed = 0
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        gain = _inverse_gains(layer, self._dense.shape[-1])

        def inside(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            del module
            held.append((args[0].float(), out.float()))

        def after(module: nn.Module, args: Any, out: Any) -> None:
            del args
            nonlocal passed
            if listens(module):
                return
            found = out if isinstance(out, torch.Tensor) else out[0]
            here = slice(passed, passed + len(found))
            gave = self._dense[here].to(found.device).float()
            apart = (gave - found.float()).mul_(self._share)
            read, alone = held.pop()
            if gain is not None:
                apart *= gain * alone.square().mean(-1, keepdim=True).sqrt()
            weights = None if self._fed.weights is None else self._fed.weights[here].to(found.device)
            self._sum.add(read, apart, weights)
            if seen is not None:
                part = seen.outputs[here]
                part.copy_(part.to(found.device).float() + apart)
            passed += len(found)

        handles = [
            layer.get_submodule(self._group.reader).register_forward_hook(inside),
            layer.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> Shift:
        """Call it once, when all windows have passed."""
        return Shift(*self._sum.result())


def _inverse_gains(layer: nn.Module, hidden: int) -> torch.Tensor | None:
    """1 / g [hidden] of the norm between the layer's FFN and its residual stream, floored; None where there is none."""
    name = norm_behind_ffn(dict(layer.named_parameters()))
    if name is None:
        return None
    weight = layer.get_parameter(f"{name}.weight")
    ones = torch.ones(1, hidden, device=weight.device, dtype=weight.dtype)  # a norm gives its gains for them
    gain: torch.Tensor = layer.get_submodule(name)(ones)[0].float()
    return gain / (gain.square() + FLOOR * gain.square().mean())
