"""What was found, as the data that everything else works with: a Family whose shapes are those of the stock model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from compress.arch import Cut, Family, Group, Sizes
from compress.errors import UserError
from compress.trace import ASIDE, Unproved
from compress.trace.find import Coupled, Found
from compress.trace.small import key_of, meta, read

Shapes = dict[str, tuple[int, ...]]


def family_of_found(found: Found, config: Mapping[str, Any]) -> Family:
    """The family of a raw config in which `found` holds. Unproved where its layers are not all of one shape."""
    shapes, ffn = _layer_shapes(found, config)
    said = config.get(found.ffn_key)
    if type(said) is int and said != ffn:
        raise Unproved(f"its FFN has {ffn} neurons, where {found.ffn_key} is {said}")
    base = read(config) | {"intermediate_size": ffn}
    heads, kv_heads, width = (base[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def groups(sizes: Sizes, config: Mapping[str, Any]) -> tuple[Group, ...]:
        del config
        of_heads = (sizes.heads, found.output, width, _cuts(found.head_cuts, sizes.heads), "num_attention_heads")
        of_ffn = (sizes.ffn, found.ffn, 1, _cuts(found.ffn_cuts, sizes.ffn), found.ffn_key)
        return (Group("heads", *of_heads, max(1, sizes.heads // kv_heads)), Group("ffn", *of_ffn, sizes.ffn))

    def layer(sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
        del config
        made = {name: list(shape) for name, shape in shapes.items()}
        for cuts, gone in ((found.head_cuts, heads - sizes.heads), (found.ffn_cuts, ffn - sizes.ffn)):
            for cut in cuts:
                made[cut.tensor][cut.axis] -= gone * cut.width
        return {name: tuple(shape) for name, shape in made.items()}

    def refuse(sizes: Sizes, config: Mapping[str, Any]) -> str | None:
        if sizes.heads == heads and sizes.ffn == ffn:
            return None
        if sizes.heads != heads and found.no_heads is not None:
            return f"query heads of this {config['model_type']} cannot be cut: {found.no_heads}"
        changes = {
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
        }
        return _unloadable(
            found, family.with_units(config, {**changes, "intermediate_size": sizes.ffn}), layer(sizes, config)
        )

    family = Family(
        name=config["model_type"],
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        text=found.text,
        head=found.head,
        rope="as the stock class",
        layer=layer,
        groups=groups,
        refuse=refuse,
        skip=(found.head,),
        parts=found.parts,
        norm=found.norm,
        before=found.before,
        read=lambda text: _sizes(found, json.dumps(_told(text), sort_keys=True)),
        keys={**{key: key_of(config, key) for key in base}, "intermediate_size": found.ffn_key},
        head_beside=lambda text: found.beside,
        traced=True,
        fixed_depth=found.no_depth,
    )
    return family


def _cuts(coupled: tuple[Coupled, ...], units: int) -> tuple[Cut, ...]:
    return tuple(Cut(c.tensor, c.axis, c.block * units * c.width, c.width) for c in coupled)


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ASIDE}


@lru_cache(maxsize=64)
def _sizes(found: Found, config: str) -> Mapping[str, Any]:
    """The sizes that the stock class makes of a config, the FFN's width among them."""
    raw = json.loads(config)
    named = raw.get(found.ffn_key)
    width = named if type(named) is int else _layer_shapes(found, {**raw, key_of(raw, "num_hidden_layers"): 1})[1]
    return {**read(raw), "intermediate_size": width}


def _layer_shapes(found: Found, config: Mapping[str, Any]) -> tuple[Shapes, int]:
    """The shapes of one layer of the stock model, and the width of its FFN; all layers must be alike."""
    stack = meta(config).get_submodule(f"{found.text}.{found.parts.layers}")
    assert isinstance(stack, nn.ModuleList)
    each = [{name: tuple(value.shape) for name, value in layer.named_parameters()} for layer in stack]
    other = next((index for index, shapes in enumerate(each) if shapes != each[0]), None)
    if other is not None:
        raise Unproved(f"its layers differ: layer {other} has other tensors than layer 0")
    return each[0], each[0][f"{found.ffn}.weight"][1]


def _unloadable(found: Found, config: Mapping[str, Any], planned: Shapes) -> str | None:
    """Why stock transformers does not build `config` with layers of the `planned` shapes, or None."""
    family = config["model_type"]
    try:
        shapes, _ = _layer_shapes(found, config)
    except UserError as error:
        return f"{error.message.removeprefix('config.json: ')}"
    wrong = next((name for name, shape in planned.items() if shapes.get(name) != shape), None)
    if wrong is None:
        return None
    return (
        f"stock transformers would not load such a {family}: it makes '{wrong}' {list(shapes.get(wrong, ()))}, where "
        f"{list(planned[wrong])} is left"
    )


def without_heads(found: Found, why: str) -> Found:
    """The same, but that query heads stay; what reads them is still known."""
    return replace(found, no_heads=why, head_cuts=found.head_cuts[:1])
