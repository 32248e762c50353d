"""What of a vision tower can be cut, as data: whole blocks, and FFN neurons of the merger behind them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress.arch.family import Cut, Group
from compress.checkpoint.headers import Header, TensorSpec
from compress.errors import UserError

VISION_FFN = "vision_ffn"  # the group's name in plans, scores and receipts


@dataclass(frozen=True)
class TowerSizes:
    """`depth`: blocks. `ffn`: neurons of the merger's FFN. `width`: what the merger takes and gives for a token."""

    depth: int
    ffn: int
    width: int


@dataclass(frozen=True)
class TowerKeys:
    """Names of `TowerSizes` in vision_config."""

    depth: str
    ffn: str
    width: str


@dataclass(frozen=True)
class Tower:
    """A vision tower whose blocks are alike, and whose merger ends in gate_proj, up_proj and down_proj without biases.

    path: its module in the stock model, named so on disk as well; blocks, merger: modules inside it. keys: what
    vision_config calls the sizes; defaults: what its config class fills in for them. kind: the `model_type` that
    vision_config must have where the stock model picks the tower's class by it; None: it knows one class only.
    """

    path: str
    blocks: str
    merger: str
    keys: TowerKeys
    defaults: TowerSizes
    kind: str | None = None

    @property
    def inside(self) -> str:
        """Prefix of the tensors of all blocks, with the dot."""
        return f"{self.path}.{self.blocks}."

    @property
    def behind(self) -> str:
        """Prefix of the merger's tensors, with the dot."""
        return f"{self.path}.{self.merger}."

    def sizes(self, config: Mapping[str, Any]) -> TowerSizes:
        """What a raw config.json says; UserError for a size that is no whole number above 0, and for another kind."""
        found = config.get("vision_config")
        said = found if isinstance(found, Mapping) else {}
        kind = said.get("model_type") or self.kind
        if self.kind is not None and kind != self.kind:
            raise UserError(f"config.json: a vision tower of the kind {kind} is not cut, only {self.kind}")

        def size(key: str, default: int) -> int:
            value = said.get(key)
            value = default if value is None else value
            if type(value) is not int or value <= 0:
                raise UserError(f"config.json: vision_config.{key} must be a positive whole number, found {value!r}")
            return value

        keys, defaults = self.keys, self.defaults
        return TowerSizes(
            size(keys.depth, defaults.depth), size(keys.ffn, defaults.ffn), size(keys.width, defaults.width)
        )

    def unlike(self, header: Header) -> str | None:
        """Why a checkpoint's config or tensors are not those of such a tower, of which any block can take the place of
        any other; None where they are."""
        try:
            sizes = self.sizes(header.config)
        except UserError as error:
            return error.message
        for name, shape in self._merger(sizes).items():
            spec = header.tensors.get(self.behind + name)
            if spec is None or spec.shape != shape:
                found = "is missing" if spec is None else f"has shape {list(spec.shape)}"
                return f"tensor '{self.behind + name}' {found}, config.json implies {list(shape)}"
        blocks: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for name, spec in header.tensors.items():
            if name.startswith(self.inside):
                index, _, inner = name.removeprefix(self.inside).partition(".")
                blocks.setdefault(index, {})[inner] = spec.dtype, spec.shape
        if blocks.keys() != set(map(str, range(sizes.depth))):
            return f"the tensors are of {len(blocks)} vision blocks, config.json says {sizes.depth}"
        for index, block in blocks.items():
            if block != blocks["0"]:
                return f"vision block {index} differs from block 0 in the dtypes or shapes of its tensors"
        return None

    def _merger(self, sizes: TowerSizes) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that own the merger's neurons."""
        rows, columns = (sizes.ffn, sizes.width), (sizes.width, sizes.ffn)
        return {"gate_proj.weight": rows, "up_proj.weight": rows, "down_proj.weight": columns}

    def group(self, sizes: TowerSizes) -> Group:
        """The merger's FFN neurons; names are inside the merger."""
        cuts = (Cut("gate_proj.weight", 0), Cut("up_proj.weight", 0), Cut("down_proj.weight", 1))
        return Group(VISION_FFN, sizes.ffn, "down_proj", 1, cuts, self.keys.ffn, sizes.ffn)

    def cut(self, header: Header, depth: int, ffn: int) -> Header:
        """`header`, planned, with the first `depth` blocks, which stand for any, and `ffn` neurons in the merger; the
        very same where all stay."""
        sizes = self.sizes(header.config)
        fewer = {
            key: count
            for key, count, whole in ((self.keys.depth, depth, sizes.depth), (self.keys.ffn, ffn, sizes.ffn))
            if count < whole
        }
        if not fewer:
            return header
        gone = tuple(f"{self.inside}{index}." for index in range(depth, sizes.depth))
        tensors = {name: spec for name, spec in header.tensors.items() if not name.startswith(gone)}
        for name, shape in self._merger(replace(sizes, ffn=ffn)).items():
            spec = tensors[self.behind + name]
            tensors[spec.name] = TensorSpec(spec.name, spec.dtype, shape)
        vision = {**(header.config.get("vision_config") or {}), **fewer}
        return header.planned({**header.config, "vision_config": vision}, tensors.values())


def cut_sizes(tower: Tower | None, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[int]]:
    """What a step made of a tower, of raw configs: `{"vision_layers": [24, 12], "vision_ffn": [13696, 8192]}`, of the
    sizes that differ."""
    try:
        sides = [] if tower is None else [tower.sizes(config) for config in (before, after)]
    except UserError:  # of another kind: not cut
        return {}
    pairs = {"vision_layers": [each.depth for each in sides], VISION_FFN: [each.ffn for each in sides]}
    return {name: counts for name, counts in pairs.items() if len(set(counts)) > 1}
