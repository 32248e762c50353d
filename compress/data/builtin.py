"""`builtin`: English prose that every CPython carries (`pydoc_data.topics`), split by topic into three parts that
share no paragraph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from compress.data.spec import Part
from compress.errors import UserError

SHARES: dict[Part, float] = {"calibration": 0.4, "training": 0.4, "evaluation": 0.2}
PARAGRAPH = 40  # normalised characters; shorter paragraphs ("For example:") may stand in several topics


@cache  # a run asks for it in every step
def builtin_parts() -> Mapping[Part, Sequence[str]]:
    """The three parts of `builtin`: lists of topics, about 40 / 40 / 20 by characters.

    A fifth of the topics' text is sections included a second time. Every paragraph is kept once, in the longest topic
    that has it, before topics are dealt out (the longest first, to the part that lacks most), so parts share none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no pydoc_data, so builtin data is not available",
            hint="name another source, as a .txt file",
        ) from None
    seen: set[str] = set()
    left: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [(p, normalised(p)) for p in re.split(r"\n[ \t]*\n", topics[name])]
        fresh = []
        for paragraph, plain in paragraphs:
            if plain and plain not in seen:
                fresh.append(paragraph)
            if len(plain) > PARAGRAPH:
                seen.add(plain)
        if any(len(normalised(p)) > PARAGRAPH for p in fresh):
            left[name] = "\n\n".join(fresh)
    return MappingProxyType({part: tuple(texts) for part, texts in _deal(left).items()})


def normalised(paragraph: str) -> str:
    """The paragraph with every run of whitespace as one space."""
    return " ".join(paragraph.split())


def _deal(topics: dict[str, str]) -> dict[Part, list[str]]:
    names: dict[Part, list[str]] = {part: [] for part in SHARES}
    size: dict[Part, int] = dict.fromkeys(SHARES, 0)
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        part = min(SHARES, key=lambda part: size[part] / SHARES[part])
        names[part].append(name)
        size[part] += len(topics[name])
    return {part: [topics[name] for name in sorted(chosen)] for part, chosen in names.items()}
