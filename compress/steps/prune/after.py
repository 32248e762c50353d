"""The checkpoint as it is after the step: its header, the label under which it loads, who loads it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compress.arch import SAME, Family, Group, Rewrite, Sizes, family_of
from compress.arch.kv import KV_HEADS
from compress.checkpoint import per_layer
from compress.checkpoint.headers import Header, TensorSpec
from compress.steps.prune.decoder import Keeps, Layer, own
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.widths import BUDGETS
from compress.steps.types import Complain


def cut(before: Header, family: Family, layers: Sequence[Layer], keep: Keeps) -> Header:
    """The header with the kept units alone, under the label it has."""
    sizes = family.sizes(before)
    gone = tuple(family.prefix(index) for index in range(len(layers), sizes.layers))
    tensors = {name: spec for name, spec in before.tensors.items() if not name.startswith(gone)}
    for index, (layer, each) in enumerate(zip(layers, keep, strict=True)):
        prefix = family.prefix(index)
        for group in layer.groups.values():
            for name in {cut.tensor for cut in group.cuts}:
                spec = tensors[prefix + name]
                shape = cut_shape(spec.shape, name, group, each[group.name])
                tensors[prefix + name] = TensorSpec(spec.name, spec.dtype, shape)
    changes, kv = {}, keep[0].get(KV_HEADS, sizes.kv_heads)
    fewer = any(each["heads"] < own(layer, "heads") for layer, each in zip(layers, keep, strict=True))
    if fewer or kv < sizes.kv_heads:
        # without explicit keys, stock code would derive another head_dim and KV count from fewer heads
        changes = {"num_key_value_heads": kv, "head_dim": sizes.head_dim}
    config = family.shallow(before, range(len(layers))) if gone else before.config
    told = [family.named(own) for own in _told_layers(before, sizes, keep, bool(changes))]
    text = per_layer.with_layers(per_layer.text_of(config), told)
    return before.planned(family.with_text(config, {**text, **family.named(changes)}), tensors.values())


def _told_layers(before: Header, sizes: Sizes, keep: Keeps, fewer_heads: bool) -> list[dict[str, int]]:
    """What config.json says of each layer; keys about which it has nothing new to say are left as they are."""
    differ = per_layer.is_per_layer(before.config)
    narrower = differ or any(each["ffn"] != sizes.ffn for each in keep)
    keys = {per_layer.FFN: "ffn"} if narrower else {}
    keys |= {per_layer.HEADS: "heads"} if differ or fewer_heads else {}
    return [{key: each[group] for key, group in keys.items()} for each in keep]


def cut_shape(shape: tuple[int, ...], name: str, group: Group, keep: int) -> tuple[int, ...]:
    """The shape of one layer tensor after `group` keeps `keep` units."""
    new = list(shape)
    for cut in group.cuts:
        if cut.tensor == name:
            new[cut.axis] -= (group.units - keep) * cut.width
    return tuple(new)


def labelled(
    family: Family,
    before: Header,
    layers: Sequence[Layer],
    keep: Keeps,
    options: PruneOptions,
    complain: Complain,
) -> tuple[Rewrite, str] | None:
    """The label under which every layer can be loaded, and why it is another one; None after a complaint."""
    found = SAME, ""
    seen = {
        replace(layer.sizes, heads=each["heads"], kv_heads=each.get(KV_HEADS, layer.sizes.kv_heads)): layer.sizes
        for layer, each in zip(layers, keep, strict=True)
    }
    for sizes, whole in seen.items():
        if (sizes.heads, sizes.kv_heads) == (whole.heads, whole.kv_heads):
            continue
        rewrite, why = family.label(before.config, sizes, options.flavour)
        if rewrite is None:
            keys = ("heads", "keep_heads", "keep_kv_heads", "kv_cache_bytes", "pin", *BUDGETS)
            key = next((key for key in keys if getattr(options, key) is not None), "keep_heads")
            complain("flavour" if any(r.flavour for r in family.rewrites) else key, why)
            return None
        if rewrite is not SAME:
            found = rewrite, why
    return found


def label_notes(before: Family, result: Header, why: str) -> list[str]:
    """Under which label the result stands and why, and who loads it, where that is not plain."""
    after = family_of(result)
    notes = [f"written as {after.model_type}, because {why}"] if why else []
    if after.rope != before.rope:
        notes.append(f"the rotary rows of every head in q_proj and k_proj go from {before.rope} to {after.rope}")
    if why or after.stock is not None:
        notes.append(f"loaded by {' and '.join(after.loaders_of(result.config))}")
    return notes


def loading(after: Header) -> dict[str, Any]:
    """Who loads the result, and in which order its rotary rows lie: shapes alone do not tell."""
    family = family_of(after)
    return {
        "model_type": family.model_type,
        "rope_layout": family.rope,
        "stock_transformers": family.stock is None,
        "loaded_by": list(family.loaders_of(after.config)),
        "trust_remote_code": per_layer.is_per_layer(after.config),
    }
