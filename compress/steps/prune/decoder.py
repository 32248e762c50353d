"""What can be cut of a decoder, layer by layer, and what stays of it. From headers, torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from compress.arch import Family, Group, Sizes
from compress.checkpoint.headers import Header

WIDE = 2048  # hidden size from which FFN widths are multiples of 256 (GGUF K-quants, tensor parallelism, INT8 kernels)

Keep = Mapping[str, int]  # group -> units that stay in one layer
Keeps = tuple[Keep, ...]  # one a layer


@dataclass(frozen=True)
class Layer:
    """What is cut in one layer: its sizes, its groups by name, the shapes of its tensors."""

    sizes: Sizes
    groups: Mapping[str, Group]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def matrix_parameters(self) -> int:
        """Attention + FFN matrix parameters."""
        return sum(shape[0] * shape[1] for shape in self.shapes.values() if len(shape) == 2)

    def weight(self, group: str) -> int:
        """Matrix parameters of one unit."""
        return self.groups[group].parameters_per_unit(self.shapes)

    def removed(self, keep: Keep) -> int:
        """Matrix parameters that go."""
        return sum((g.units - keep[name]) * self.weight(name) for name, g in self.groups.items())


@dataclass(frozen=True)
class Decoder:
    """What is cut, layer by layer, and `measure`: what would be left of the whole model, parameters and bytes of its
    weight files. `fixed`: the units that must stay in a (layer, group), by hand; `kv`: the KV heads that stay, where
    they are a group; `gone`: matrix parameters of the layers that go as a whole, which are not among `layers`;
    `beside`: parameters that go from the vision tower, as `measure` knows."""

    layers: tuple[Layer, ...]
    measure: Callable[[Keeps], tuple[int, int]]
    fixed: Mapping[tuple[int, str], int] = field(default_factory=dict)
    kv: Mapping[str, int] = field(default_factory=dict)
    gone: int = 0
    beside: int = 0

    @cached_property
    def matrix_parameters(self) -> int:
        """Attention + FFN matrix parameters of all layers."""
        return self.gone + sum(layer.matrix_parameters for layer in self.layers)

    @property
    def sizes(self) -> Sizes:
        """Of a layer that has the most FFN neurons; what all layers share is in it."""
        return max((layer.sizes for layer in self.layers), key=lambda sizes: sizes.ffn)

    @property
    def most_heads(self) -> Sizes:
        """Of a layer that has the most query heads."""
        return max((layer.sizes for layer in self.layers), key=lambda sizes: sizes.heads)

    def removed(self, keeps: Keeps) -> int:
        """Matrix parameters that go from all layers, and with them."""
        return self.gone + sum(layer.removed(keep) for layer, keep in zip(self.layers, keeps, strict=True))

    def free(self, group: str) -> list[Layer]:
        """The layers whose `group` is not fixed."""
        return [layer for index, layer in enumerate(self.layers) if (index, group) not in self.fixed]

    def keeps(self, heads: Callable[[Layer], int], ffn: Callable[[Layer], int]) -> Keeps:
        """What stays when every layer that is not fixed follows the two rules."""
        rules = {"heads": heads, "ffn": ffn}
        return tuple(
            {
                **{
                    name: self.fixed[index, name] if (index, name) in self.fixed else min(rule(layer), own(layer, name))
                    for name, rule in rules.items()
                },
                **self.kv,
            }
            for index, layer in enumerate(self.layers)
        )


def own(layer: Layer, group: str) -> int:
    """All units that a layer has."""
    return layer.groups[group].units


def whole_heads(layer: Layer) -> int:
    """The rule that no head goes."""
    return own(layer, "heads")


def whole_ffn(layer: Layer) -> int:
    """The rule that no neuron goes."""
    return own(layer, "ffn")


def by_layer(keeps: Keeps) -> list[str]:
    """`heads: 9 in every layer`; `FFN by layer, from the first: 1,536 x 2, 640, 720 x 3`."""
    told = []
    for name, noun in (("ffn", "FFN"), ("heads", "heads")):
        runs = [(width, len(list(same))) for width, same in groupby(keep[name] for keep in keeps)]
        each = ", ".join(f"{width:,}" + (f" x {count}" if count > 1 else "") for width, count in runs)
        alike = f"{noun}: {runs[0][0]:,} in every layer"
        told.append(alike if len(runs) == 1 else f"{noun} by layer, from the first: {each}")
    return told


def layers_of(header: Header, family: Family) -> tuple[Layer, ...]:
    """What can be cut in every layer; layers of the same sizes are one object."""
    config, sizes = header.text_config, family.layers(header)
    made = {
        own: Layer(own, {group.name: group for group in family.groups(own, config)}, family.layer(own, config))
        for own in set(sizes)
    }
    return tuple(made[own] for own in sizes)


def width_multiple(hidden: int) -> int:
    """FFN widths that are not given exactly are multiples of this."""
    return 256 if hidden >= WIDE else 8
