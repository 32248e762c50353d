"""The vocabulary of the family descriptions: Sizes, Cut, Group, Rewrite, Family. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint import per_layer
from compress.checkpoint.headers import Header
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.arch.tower import Tower


@dataclass(frozen=True)
class Sizes:
    """The decoder's sizes, with the defaults that stock transformers fills in."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def kv_cache(self, width: int) -> int:
        """Bytes that the keys and values of one token take in all layers, at `width` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width


@dataclass(frozen=True)
class Cut:
    """Unit u of a group owns [offset + u*width, offset + (u+1)*width) of `axis` of `tensor` (a name in the layer).

    A fused tensor is several cuts of one tensor: gate rows at 0, up rows at n.
    """

    tensor: str
    axis: int
    offset: int = 0
    width: int = 1


@dataclass(frozen=True)
class Group:
    """Units that can go: FFN neurons or query heads. `reader` is the Linear whose inputs the units are (the one that
    is refitted), `cuts` all places the units own, the reader's columns among them. Units of one balance block
    (`balance` of them in a row: the query heads of one KV head) lose equally many."""

    name: str
    units: int
    reader: str
    width: int
    cuts: tuple[Cut, ...]
    config_key: str
    balance: int

    def parameters_per_unit(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Matrix parameters that one unit owns; biases do not count."""
        total = 0
        for cut in self.cuts:
            shape = shapes[cut.tensor]
            if len(shape) == 2:
                total += cut.width * shape[1 - cut.axis]
        return total


@dataclass(frozen=True)
class Rewrite:
    """The same decoder under the label of another family, for a shape that its own stock class refuses.

    flavour: the prune option that asks for it, None where there is one way only. config: the raw config.json with the
    new shape -> a new one under the other label, every default spelled out on which the two classes differ.
    refuse: why a checkpoint cannot take the label, from its config, or None. why: completes "because A; ...".
    Where the two families differ in `rope`, rows of q_proj and k_proj change places (compress/arch/rope.py).
    """

    flavour: str | None
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    refuse: Callable[[Mapping[str, Any]], str | None]
    why: str


@dataclass(frozen=True)
class Parts:
    """What a decoder calls its embedding, its list of layers and its last norm."""

    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"


SAME = Rewrite(flavour=None, config=dict, refuse=lambda config: None, why="")  # the label that it has


@dataclass(frozen=True)
class Family:
    """One model family.

    name: its key in FAMILIES. model_type: what config.json says; unlike: why a config of that type is not this family.
    architecture: the stock class that config.json must name.
    text: module path of the decoder in the stock model. stored: what its tensors' names begin with on disk, where that
    is another. parts: what it calls its embedding, its layers and its last norm. head: name of the output matrix.
    rope: order of the rotary rows of a head in q_proj and k_proj, `interleaved` or `half-split`;
    rotary: the share of them that its config class fills in for a missing partial_rotary_factor.
    layer: shapes of one layer's tensors, in the family's order, from Sizes and the text config.
    groups: what can be cut. refuse: a reason why planned sizes, beside the raw config, cannot be loaded by stock
    transformers, or None. rewrites: the labels under which it can be loaded then.
    defaults: what its config class fills in for a missing num_key_value_heads (else as many as heads), head_dim (else
    hidden_size // heads) and tie_word_embeddings (else false).
    stock: for a family that stock transformers does not load, the rewrite under which its classes compute the same.
    vllm: what loads it in vLLM, where that was run and compared (docs/families.md); None where it was not.
    skip: module-name prefixes that quantization leaves alone.
    head_beside: what the model does with logits beside the product of hidden states and output matrix, or None.
    read: a text config with its sizes under the names that `Sizes` is read by; keys: what a config calls those names.
    norm: the tensors of the last norm. before: modules of the decoder that run before its first layer, beside the
    embedding. traced: found by compress/trace, and not described. fixed_depth: why none of its layers may go, or None.
    vision: module path of the vision tower that images of a calibration go through, named so on disk as well; None:
    calibrated on text alone. tower: what of it can be cut; None: nothing.
    layered: whether its layers may differ in width: its stock layer class takes a config and an index.
    """

    name: str
    model_type: str
    architecture: str
    text: str
    head: str
    rope: str
    layer: Callable[[Sizes, Mapping[str, Any]], dict[str, tuple[int, ...]]]
    groups: Callable[[Sizes, Mapping[str, Any]], tuple[Group, ...]]
    refuse: Callable[[Sizes, Mapping[str, Any]], str | None]
    skip: tuple[str, ...]
    unlike: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    rewrites: tuple[Rewrite, ...] = ()
    stock: Rewrite | None = None
    stored: str | None = None
    vllm: str | None = None
    rotary: float = 1.0
    defaults: Mapping[str, int] = field(default_factory=dict)
    head_beside: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    parts: Parts = Parts()
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    keys: Mapping[str, str] = field(default_factory=dict)
    norm: tuple[str, ...] = ("weight",)
    before: tuple[str, ...] = ()
    traced: bool = False
    fixed_depth: str | None = None
    layered: bool = False
    vision: str | None = None
    tower: Tower | None = None

    @property
    def loaders(self) -> tuple[str, ...]:
        """Who loads a checkpoint of this family, in words."""
        found = [] if self.stock is not None else [f"stock transformers ({self.architecture})"]
        return (*found, *([f"vLLM ({self.vllm})"] if self.vllm else []))

    def loaders_of(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Who loads a checkpoint of this config: where layers differ, stock transformers with the folder's own code."""
        if not per_layer.is_per_layer(config):
            return self.loaders
        return (f"stock transformers with trust_remote_code=True ({per_layer.PREFIX}{self.architecture})",)

    def label(self, config: Mapping[str, Any], sizes: Sizes, flavour: str) -> tuple[Rewrite | None, str]:
        """The label for a checkpoint with fewer heads, `sizes`, and why it is another one; or None, and why none fits.

        flavour: what the prune option says; it counts for families whose rewrites have flavours.
        """
        reason = self.refuse(sizes, config)
        if reason is None and self.stock is None:
            return SAME, ""
        found = next((r for r in self.rewrites if r.flavour in (None, flavour)), None)
        if found is None:
            if reason is None:
                return SAME, ""  # it has the flavour that was asked for
            allowed = ", ".join(str(r.flavour) for r in self.rewrites)
            return None, f"a {self.model_type} does not become {flavour}; allowed: {allowed}" if allowed else reason
        refusal = found.refuse(config)
        if refusal is not None:
            return None, f"{reason}; {refusal}"
        return found, f"{reason or f'flavour {flavour} was asked for'}; {found.why}"

    @property
    def root(self) -> str:
        """What the names of the decoder's tensors begin with on disk, without the dot."""
        return self.stored or self.text

    @property
    def embedding(self) -> str:
        """The embedding's tensor, on disk."""
        return f"{self.root}.{self.parts.embedding}.weight"

    @property
    def inside(self) -> str:
        """Prefix of the tensors of all decoder layers, with the dot."""
        return f"{self.root}.{self.parts.layers}."

    def parameter(self, name: str) -> str:
        """What the stock model calls the tensor `name`, if it is the decoder's; else as it is."""
        return f"{self.text}.{name.removeprefix(f'{self.root}.')}" if name.startswith(f"{self.root}.") else name

    def prefix(self, layer: int) -> str:
        """Prefix of the tensors of one decoder layer, with the dot."""
        return f"{self.inside}{layer}."

    def sizes(self, header: Header) -> Sizes:
        """Read the sizes; UserError names a key that is missing, not a positive whole number, or beyond the tensors."""
        config = self.read(header.text_config)

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key, self.defaults.get(key))
            value = default if value is None else value
            if type(value) is not int or value <= 0:
                raise UserError(f"config.json: {key} must be a positive whole number, found {value!r}")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(f"config.json: {heads} attention heads do not divide into {kv_heads} KV heads")
        layers, tensors = size("num_hidden_layers"), len(header.tensors)
        if tensors and layers > tensors:  # before every layer is listed: a wrong number may be a million
            noun = "tensor" if tensors == 1 else "tensors"
            raise UserError(f"config.json: num_hidden_layers is {layers}, but the checkpoint holds {tensors} {noun}")
        untold = self.defaults.get("tie_word_embeddings", False)
        tied = header.config.get("tie_word_embeddings", config.get("tie_word_embeddings", untold))
        return Sizes(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size("head_dim", hidden // heads),
            ffn=size("intermediate_size"),
            vocab=size("vocab_size"),
            tied=bool(tied),
        )

    def layers(self, header: Header) -> tuple[Sizes, ...]:
        """The sizes of every decoder layer: `sizes`, with the heads and the FFN width that `per_layer_config` gives the
        layer. UserError names what is wrong with that key."""
        sizes = self.sizes(header)
        own = per_layer.own_sizes(header.text_config, sizes.layers)

        def of(index: int) -> Sizes:
            said = own.get(index, {})
            heads = said.get(per_layer.HEADS, sizes.heads)
            if heads % sizes.kv_heads:
                raise UserError(
                    f"config.json: {per_layer.KEY}: {index}: {heads} attention heads do not divide into "
                    f"{sizes.kv_heads} KV heads"
                )
            return replace(sizes, heads=heads, ffn=said.get(per_layer.FFN, sizes.ffn)) if said else sizes

        return tuple(of(index) for index in range(sizes.layers))

    def widest(self, header: Header) -> int:
        """The index of a decoder layer that has the most parameters: what estimates of one layer's memory count."""
        layers, config = self.layers(header), header.text_config
        each = {own: sum(math.prod(shape) for shape in self.layer(own, config).values()) for own in set(layers)}
        return max(range(len(layers)), key=lambda index: each[layers[index]])

    def shapes(self, header: Header) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of the text model that the config implies."""
        sizes, config = self.sizes(header), header.text_config
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (sizes.vocab, sizes.hidden)}
        layers = self.layers(header)
        made = {own: self.layer(own, config) for own in set(layers)}
        for index, own in enumerate(layers):
            shapes |= {self.prefix(index) + name: shape for name, shape in made[own].items()}
        shapes |= {f"{self.root}.{self.parts.norm}.{key}": (sizes.hidden,) for key in self.norm}
        if not sizes.tied:
            shapes[f"{self.head}.weight"] = (sizes.vocab, sizes.hidden)
        return shapes

    def head_tensor(self, header: Header) -> str:
        """The tensor that the output matrix is read from: the embedding when the two are tied."""
        return self.embedding if self.sizes(header).tied else f"{self.head}.weight"

    def shallow(self, header: Header, layers: Sequence[int]) -> dict[str, Any]:
        """The raw config with the decoder layers `layers` only, ascending, and of its lists with one entry a layer
        those entries."""
        deep, text = self.sizes(header).layers, header.text_config
        each = {key: [said[index] for index in layers] for key, said in per_layer.lists(text, deep).items()}
        own = per_layer.shallow(text, layers)
        return self.with_units(header.config, {"num_hidden_layers": len(layers), **each, **own})

    def with_lists(self, header: Header, found: Mapping[str, Any]) -> Header:
        """`header`, planned, with the lists of one entry a layer that the raw config `found` of as many layers has.

        Which layers go is found when a step runs; until then the lists of the plans behind it are of the right length
        only.
        """
        deep, text = self.sizes(header).layers, per_layer.text_of(found)
        lists = per_layer.lists(text, deep) if self.read(text).get("num_hidden_layers") == deep else {}
        return replace(header, config=self.with_units(header.config, lists)) if lists else header

    def with_units(self, config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the raw config with text sizes changed (`{"intermediate_size": 1128}`)."""
        return self.with_text(config, {**per_layer.text_of(config), **self.named(changes)})

    def named(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Text sizes under the names that a config of this family has for them (`n_inner` for `intermediate_size`)."""
        return {self.keys.get(key, key): value for key, value in sizes.items()}

    def with_text(self, config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the raw config with `text` as the description of the decoder."""
        return {**config, "text_config": dict(text)} if isinstance(config.get("text_config"), Mapping) else dict(text)
