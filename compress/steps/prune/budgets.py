"""Layer budgets by hand: decoder modules that are not cut at all, and exact widths. From headers, torch-free.

A pattern names modules as `layers.11.mlp` does, part by part: each part is exact, a glob (`layers.2?.self_attn`,
`layers.*.mlp`), or for the layer a range (`layers.0-3.*`); so `layers.1.*` is layer 1 alone. Every pattern must match.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from compress.errors import did_you_mean
from compress.steps.prune.decoder import Layer
from compress.steps.prune.options import PruneOptions
from compress.steps.types import Complain

At = tuple[int, str]  # (layer, group)
RANGE = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")


@dataclass(frozen=True)
class Fixed:
    """The units that stay by hand, by (layer, group), and what is to be told of it."""

    units: Mapping[At, int]
    notes: tuple[str, ...]


def fixed_by_hand(options: PruneOptions, layers: Sequence[Layer], complain: Complain) -> Fixed | None:
    """What `protect` and `pin` say; None after a complaint: a pattern that matches nothing, a width that cannot be, two
    that contradict each other."""
    names = module_names(layers)
    found: dict[At, tuple[int, str]] = {}
    notes: list[str] = []
    fine = True

    def refuse(key: str, message: str) -> None:
        nonlocal fine
        fine = False
        complain(key, message)

    for pattern in options.protect or ():
        hit = _matched(pattern, names, len(layers))
        if not hit:
            refuse("protect", _unmatched(pattern, names, len(layers)))
            continue
        notes.append(f"protect '{pattern}': {_counted(hit)} not cut")
        for layer, group in hit:
            _set(found, (layer, group), layers[layer].groups[group].units, f"protect '{pattern}'", refuse)
    for pattern, width in (options.pin or {}).items():
        hit = _matched(pattern, names, len(layers))
        if not hit:
            refuse("pin", _unmatched(pattern, names, len(layers)))
            continue
        wrong = next(filter(None, (_wrong(layers[layer], group, width) for layer, group in hit)), None)
        if wrong:
            refuse("pin", f"'{pattern}': {width} {wrong}")
            continue
        notes.append(f"pin '{pattern}': {_counted(hit)} of {width} {' or '.join(sorted({_unit(g) for _, g in hit}))}")
        for at in hit:
            _set(found, at, width, f"pin '{pattern}'", refuse)
    return Fixed({at: width for at, (width, _) in found.items()}, tuple(notes)) if fine else None


def module_names(layers: Sequence[Layer]) -> dict[str, At]:
    """`layers.11.mlp` -> (11, "ffn"): the modules that can be cut."""
    return {
        f"layers.{index}.{group.reader.split('.')[0]}": (index, name)
        for index, layer in enumerate(layers)
        for name, group in layer.groups.items()
    }


def _matched(pattern: str, names: Mapping[str, At], layers: int) -> list[At]:
    parts = pattern.split(".")
    if (span := _range(pattern)) and int(span[2]) >= layers:
        return []  # a slip that would take all the others
    if len(parts) == 2:  # a layer with all that is in it
        parts.append("*")
    return [at for name, at in names.items() if _same(parts, name.split("."))]


def _range(pattern: str) -> re.Match[str] | None:
    """The layers that a pattern names by their first and last."""
    parts = pattern.split(".")
    return RANGE.fullmatch(parts[1]) if len(parts) > 1 else None


def _same(pattern: Sequence[str], name: Sequence[str]) -> bool:
    """Whether every part of a pattern takes the part of the name in its place."""
    if len(pattern) != len(name):
        return False
    span = RANGE.fullmatch(pattern[1])
    layer = int(span[1]) <= int(name[1]) <= int(span[2]) if span else fnmatchcase(name[1], pattern[1])
    return layer and fnmatchcase(name[0], pattern[0]) and fnmatchcase(name[2], pattern[2])


def _unmatched(pattern: str, names: Mapping[str, At], layers: int) -> str:
    if (span := _range(pattern)) and int(span[2]) >= layers:
        return f"'{pattern}': the model has layers 0 to {layers - 1}"
    modules = ", ".join(dict.fromkeys(name.split(".")[2] for name in names))
    near = did_you_mean(pattern, names)
    return f"'{pattern}' matches no module{near or f'; there are layers.0 to layers.{layers - 1}, each with {modules}'}"


def _counted(hit: Sequence[At]) -> str:
    return "1 module" if len(hit) == 1 else f"{len(hit)} modules"


def _unit(group: str) -> str:
    return {"heads": "heads", "ffn": "neurons"}.get(group, "units")


def _wrong(layer: Layer, group: str, width: int) -> str | None:
    """Why a group cannot keep so many units."""
    units, balance = layer.groups[group].units, layer.groups[group].balance
    blocks = units // balance
    if width > units:
        return f"{_unit(group)} cannot stay: the module has {units}"
    if width % blocks:
        return f"{_unit(group)} cannot stay: every one of {blocks} KV heads keeps equally many (a multiple of {blocks})"
    return None


def _set(found: dict[At, tuple[int, str]], at: At, width: int, said: str, refuse: Any) -> None:
    """Take a width for a module, unless another pattern wants another one."""
    if at in found and found[at][0] != width:
        other = found[at][1]
        refuse(said.split()[0], f"{said.split(' ', 1)[1]} and {other} say different widths of layer {at[0]} {at[1]}")
        return
    found[at] = (width, said)
