"""What a checkpoint is, what can be cut from it, and who loads what is left: from headers alone. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.arch import FLAVOURS, Family, Sizes, described, family_of
from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.per_layer import is_per_layer, one_or_each
from compress.checkpoint.source import locate
from compress.formats import format_of, is_quantized
from compress.machine import Progress, Silent
from compress.steps.prune.widths import width_multiple


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
        "cuts": [] if quantized else [*_head_cuts(header, family, sizes), _row("ffn", family)],
    }


def _head_cuts(header: Header, family: Family, sizes: Sizes) -> list[dict[str, Any]]:
    """One row for every label that fewer heads may get, with the counts that get it."""
    found: dict[tuple[str, str], tuple[Family, list[int]]] = {}  # name and flavour -> family and counts
    named = {rewrite.flavour for rewrite in family.rewrites}
    for flavour in [each for each in FLAVOURS if each in named] or FLAVOURS[:1]:
        for heads in range(sizes.kv_heads, sizes.heads, sizes.kv_heads):
            rewrite, _ = family.label(header.config, replace(sizes, heads=heads), flavour)
            if rewrite is not None:
                changes = {"num_attention_heads": heads, "head_dim": sizes.head_dim}
                label = described(rewrite.config(family.with_units(header.config, changes)))
                found.setdefault((label.name, flavour if flavour in named else ""), (label, []))[1].append(heads)
    return [_row("heads", label, counts, flavour or None) for (_, flavour), (label, counts) in found.items()]


def _row(cut: str, family: Family, keep: list[int] | None = None, flavour: str | None = None) -> dict[str, Any]:
    return {
        "cut": cut,
        "keep": keep,
        "flavour": flavour,
        "model_type": family.model_type,
        "architecture": family.architecture,
        "loaded_by": list(family.loaders),
    }
