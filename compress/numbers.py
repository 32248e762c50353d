"""Whole numbers that may be given as text with a unit: parameters as in 9B, bytes as in 17.9GB. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import BeforeValidator, WithJsonSchema

NUMBER = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE]\+?[0-9]{1,2})?"


@dataclass(frozen=True)
class Unit:
    """`times`: what a number is multiplied by, by the unit in capitals; `spelled`: the unit as a pattern."""

    times: Mapping[str, int]
    spelled: str


COUNTS = Unit({"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}, "[kKmMbBtT]?")
SIZES = Unit(
    {"": 1} | {f"{p}{i}B": (1024 if i else 1000) ** n for n, p in enumerate("KMGT", 1) for i in ("", "I")},
    "([kKmMgGtT][iI]?[bB])?",
)


def number_or(unit: Unit, example: str) -> tuple[BeforeValidator, WithJsonSchema]:
    """Annotations of an option that takes a whole number above 0, or text such as `example`. Text is read exactly, not
    through a float."""
    pattern = rf"^\s*{NUMBER}\s*({unit.spelled})\s*$"

    def read(found: Any) -> Any:
        if found is None:
            return None
        value = None
        if isinstance(found, str):
            if parts := re.fullmatch(pattern, found):
                value = int(Fraction(parts[1] + (parts[2] or "")) * unit.times[parts[3].upper()])
        elif isinstance(found, int) and not isinstance(found, bool):
            value = found
        elif isinstance(found, float) and math.isfinite(found):
            value = int(found)
        if value is None or value <= 0:
            raise ValueError(f"found {found!r}, allowed: a whole number above 0, or text such as {example}")
        return value

    kinds: list[dict[str, Any]] = [
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": pattern},
        {"type": "null"},
    ]
    return BeforeValidator(read), WithJsonSchema({"anyOf": kinds})
