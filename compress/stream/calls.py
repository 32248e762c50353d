"""How a stock decoder calls its layers: what it hands each of them beside the hidden states, recorded from its forward.

Masks (sliding windows among them), rotary embeddings and positions are the stock forward's own; so is what it does
with embeddings before the first layer, and with logits after the output matrix. Nothing is described twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

KEPT = 4  # shapes of a batch whose calls are remembered: whole batches and the last one, of two lengths


@dataclass(frozen=True)
class Call:
    """One call of a layer: `args` and `kwargs` as the stock forward gives them, the hidden states taken out."""

    hidden: torch.Tensor  # [B, L, hidden]; let go of where a call is remembered
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def of(self, layer: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """What `layer` makes of other hidden states [B, L, hidden] of the same shape."""
        out = layer(hidden, *self.args, **self.kwargs)
        found: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
        return found


class Last(tuple[torch.Tensor, ...]):
    """What a stock decoder gives: its last hidden states [B, L, hidden], and nothing else."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Calls:
    """The calls of the layers `layers` of the decoder `text`, which ends with `norm`, on `device`; its parameters are
    on the meta device.

    Made once for a stream: `text` gets its buffers (rotary frequencies, scales of embeddings), and the first layer is
    run on the meta device, which raises whatever stock code raises for a config that it builds but cannot run.
    """

    def __init__(
        self,
        text: nn.Module,
        layers: nn.ModuleList,
        norm: nn.Module,
        initialize: Callable[[nn.Module], None],
        device: str,
    ) -> None:
        self._text, self._layers, self._norm, self._device = text, layers, norm, device
        self._remembered: dict[tuple[torch.Size, torch.dtype], list[Call]] = {}
        for module in text.modules():
            fill_buffers(module, initialize, device)

    @torch.no_grad()
    def rehearse(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Record two tokens, and run the first layer on the meta device: how it gives its output is kept."""
        self._as_given: Callable[[torch.Tensor], Any] = lambda hidden: hidden
        first = self._record(inputs_embeds=torch.zeros(1, 2, hidden_size, dtype=dtype, device=self._device))[0]
        with _moved(self._layers[0], "meta"):
            moved = tree_map_only(
                torch.Tensor, lambda value: value.to("meta"), (first.hidden, first.args, first.kwargs)
            )
            out = self._layers[0](moved[0], *moved[1], **moved[2])
        if not isinstance(out, torch.Tensor):
            rest = (None,) * (len(out) - 1)
            self._as_given = lambda hidden: (hidden, *rest)

    def of(self, index: int, hidden: torch.Tensor, positions: torch.Tensor | None = None) -> Call:
        """The call of layer `index` for hidden states [B, L, hidden] of text without padding; of tokens at `positions`
        [3, B, L], where images stand between them, it is made anew, because every batch has its own."""
        if positions is not None:
            at = positions.to(hidden.device)
            return self._record(inputs_embeds=torch.zeros_like(hidden), position_ids=at)[index]
        key = (hidden.shape, hidden.dtype)
        if key not in self._remembered:
            if len(self._remembered) >= KEPT:
                self._remembered.clear()
            nothing = hidden.new_empty(0)
            made = self._record(inputs_embeds=torch.zeros_like(hidden))
            self._remembered[key] = [replace(call, hidden=nothing) for call in made]
        return self._remembered[key][index]

    def first(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first layer gets for `ids` [B, L], rows of the embedding that is filled: [B, L, hidden]."""
        return self._record(input_ids=ids)[0].hidden

    @torch.no_grad()
    def _record(self, **inputs: torch.Tensor) -> list[Call]:
        made: list[Call] = []

        def stand_in(hidden: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if hidden is None:
                hidden = kwargs.pop("hidden_states")
            made.append(Call(hidden, args, kwargs))
            # nothing reads what follows the last layer
            return self._as_given(hidden.to("meta") if len(made) == len(self._layers) else hidden)

        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(forward_of(layer, stand_in))
            stack.enter_context(forward_of(self._norm, lambda hidden, *_, **__: hidden))
            self._text(**inputs, use_cache=False)
        return made


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, `forward` stands in for the module's own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def listens(module: nn.Module) -> bool:
    """Whether the call of a layer that a hook sees is one that is only recorded: nothing is computed in it."""
    return "forward" in vars(module)


@torch.no_grad()
def fill_buffers(module: nn.Module, initialize: Callable[[nn.Module], None], device: str) -> None:
    """Give the module's own buffers the values that its stock class computes for them when a checkpoint is loaded."""
    own = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
    for name in own:
        module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
    if own:
        initialize(module)
    for name in own:
        module._buffers[name] = module._buffers[name].to(device)  # type: ignore[union-attr]


def empty(module: nn.Module) -> None:
    """Take the values of all parameters out of `module`; buffers stay."""
    for each in module.modules():
        for name, value in each.named_parameters(recurse=False):
            if not value.is_meta:
                setattr(each, name, nn.Parameter(value.to("meta"), requires_grad=False))


@contextmanager
def _moved(module: nn.Module, device: str) -> Iterator[None]:
    """While open, the buffers of an empty module are on `device`."""
    kept = {(each, name): value for each in module.modules() for name, value in each.named_buffers(recurse=False)}
    try:
        for (each, name), value in kept.items():
            each._buffers[name] = value.to(device)
        yield
    finally:
        for (each, name), value in kept.items():
            each._buffers[name] = value
