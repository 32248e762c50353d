"""What a checkpoint is and what can be cut from it, from headers alone. Torch-free."""

from __future__ import annotations

from typing import Any

from compress.arch import family_of
from compress.checkpoint.headers import read_header
from compress.checkpoint.source import locate
from compress.formats import format_of
from compress.machine import Progress, Silent


def inspect_model(spec: str, progress: Progress | None = None) -> dict[str, Any]:
    """Sizes, parameters, bytes, storage format and prunable groups of MODEL; UserError when it cannot be read."""
    source = locate(spec, progress=progress or Silent())
    header = read_header(source.folder)
    family = family_of(header)
    sizes = family.sizes(header)
    stored = format_of(header)
    tensors = stored.logical(header)
    decoder = [t for name, t in tensors.items() if name.startswith(f"{family.text}.layers.")]
    shapes = family.layer(sizes, header.text_config)
    groups = [
        {
            "group": group.name,
            "units_per_layer": group.units,
            "step": group.units // group.balance if group.name == "heads" else 1,
            "parameters_per_unit": group.parameters_per_unit(shapes),
            "refitted": group.reader,
        }
        for group in family.groups(sizes, header.text_config)
    ]
    return {
        "model": source.name,
        "model_type": family.model_type,
        "architecture": family.architecture,
        "format": stored.name,
        "dtype": header.dtype,
        "parameters": stored.parameters(header, family),
        "decoder_parameters": sum(t.parameters for t in decoder),
        "bytes": header.nbytes,
        "tensors": len(header.tensors),
        "files": len({where.file for where in header.locations.values()}),
        "sizes": {key: getattr(sizes, key) for key in sizes.__dataclass_fields__},
        "groups": groups,
    }
