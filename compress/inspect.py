"""What a checkpoint is, what can be cut from it, and who loads what is left: from headers alone. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from compress.arch import FLAVOURS, Family, Sizes, described, family_of
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.per_layer import is_per_layer, one_or_each
from compress.checkpoint.source import locate
from compress.formats import format_of, is_quantized
from compress.machine import Progress, Silent
from compress.steps.prune.decoder import layers_of, width_multiple
from compress.steps.prune.options import ALIGNED, DROP, PruneOptions
from compress.steps.prune.whole import layers_left


def inspect_model(spec: str, progress: Progress | None = None) -> dict[str, Any]:
    """Sizes, parameters, bytes, storage format, prunable groups and the cuts that can be loaded of MODEL.

    UserError when it cannot be read. The keys are those of `compress.api.Inspection`.
    """
    source = locate(spec, progress=progress or Silent())
    header = read_header(source.folder)
    family = family_of(header)
    sizes = family.sizes(header)
    stored, quantized = format_of(header), is_quantized(header)
    tensors = stored.logical(header)
    decoder = [t for name, t in tensors.items() if name.startswith(family.inside)]
    layers = [{g.name: g.units for g in family.groups(own, header.text_config)} for own in family.layers(header)]
    shapes = family.layer(sizes, header.text_config)
    groups = [
        {
            "group": group.name,
            "units_per_layer": one_or_each([units[group.name] for units in layers]),
            "step": group.units // group.balance if group.name == "heads" else 1,
            "multiple": group.units // group.balance if group.name == "heads" else width_multiple(sizes.hidden),
            "parameters_per_unit": group.parameters_per_unit(shapes),
            "refitted": group.reader,
        }
        for group in family.groups(sizes, header.text_config)
    ]
    return {
        "model": source.name,
        "model_type": family.model_type,
        "architecture": family.architecture,
        "traced": family.traced,
        "trust_remote_code": is_per_layer(header.config),
        "format": stored.name,
        "dtype": header.dtype,
        "parameters": stored.parameters(header, family),
        "decoder_parameters": sum(t.parameters for t in decoder),
        "bytes": header.nbytes,
        "tensors": len(header.tensors),
        "files": len({where.file for where in header.locations.values()}),
        "sizes": {key: getattr(sizes, key) for key in sizes.__dataclass_fields__},
        # vLLM was proved for plain checkpoints
        "loaded_by": [name for name in family.loaders_of(header.config) if not (quantized and name.startswith("vLLM"))],
        "groups": groups,
        "cuts": [] if quantized else list(_cuts(header, family, sizes)),
    }


def _cuts(header: Header, family: Family, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """What prune can be told to keep, and who loads what is left; the counts are those that a plan does not refuse."""
    layers = layers_of(header, family)

    def left(count: int, key: str, **besides: str) -> bool:
        options = PruneOptions.model_validate({key: count, **besides})
        return layers_left(header, family, layers, options, _unheard) is not None

    fewer = {heads: replace(sizes, heads=heads) for heads in range(sizes.kv_heads, sizes.heads, sizes.kv_heads)}
    yield from _by_label("keep_heads", header, family, fewer, {})
    for merge in (ALIGNED, DROP):  # `mean` takes the counts of `aligned`
        counts = [n for n in range(1, sizes.kv_heads) if left(n, "keep_kv_heads", kv_merge=merge)]
        # the query heads of a KV head that is dropped go as well
        heads = {n: sizes.group_size * n if merge == DROP else sizes.heads for n in counts}
        fewer = {n: replace(sizes, heads=heads[n], kv_heads=n) for n in counts}
        yield from _by_label("keep_kv_heads", header, family, fewer, {"kv_merge": DROP} if merge == DROP else {})
    yield _row("keep_ffn", header, family)
    if counts := [n for n in range(1, sizes.layers) if left(n, "keep_layers")]:
        yield _row("keep_layers", header, family, counts)
    if (tower := family.tower) is not None and tower.unlike(header) is None:
        if (depth := tower.sizes(header.config).depth) > 1:
            yield _row("keep_vision_layers", header, family, list(range(1, depth)))
        yield _row("keep_vision_ffn", header, family)


def _by_label(
    option: str, header: Header, family: Family, fewer: Mapping[int, Sizes], besides: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """One row for every label that `fewer` heads may get, with the counts that get it."""
    found: dict[tuple[str, str], tuple[Family, list[int]]] = {}  # name and flavour -> family and counts
    named = {rewrite.flavour for rewrite in family.rewrites}
    for flavour in [each for each in FLAVOURS if each in named] or FLAVOURS[:1]:
        for count, own in fewer.items():
            rewrite, _ = family.label(header.config, own, flavour)
            if rewrite is None:
                continue
            changes = {"num_attention_heads": own.heads, "num_key_value_heads": own.kv_heads, "head_dim": own.head_dim}
            label = described(rewrite.config(family.with_units(header.config, changes)))
            counts = found.setdefault((label.name, rewrite.flavour or ""), (label, []))[1]
            if count not in counts:  # a label that every flavour gives
                counts.append(count)
    for (_, flavour), (label, counts) in found.items():
        yield _row(option, header, label, counts, {**besides, **({"flavour": flavour} if flavour else {})})


def _unheard(key: str, message: str, hint: str | None = None) -> None:
    """What a plan complains about: that it does is enough here."""
    del key, message, hint


def _row(
    option: str, header: Header, family: Family, keep: list[int] | None = None, besides: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`family`: of what is left of `header`. Layers that differ still do: one option alone rarely makes them alike."""
    return {
        "option": option,
        "keep": keep,
        "besides": dict(besides or {}),
        "model_type": family.model_type,
        "architecture": family.architecture,
        "loaded_by": list(family.loaders_of(header.config)),
    }
