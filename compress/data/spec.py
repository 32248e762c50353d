"""What a user says about data: one source or several by share, how many windows, how long. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from compress.errors import UserError

Part = Literal["calibration", "training", "evaluation"]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]

BUILTIN = "builtin"
SELF = "self"
HUB = "hub:"
SUFFIXES = (".txt", ".jsonl", ".parquet")
KINDS = f"{BUILTIN}, {SELF}, hub:NAME[/CONFIG]:SPLIT, a folder, or a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"


def _source(found: Any) -> Any:
    """Refuse in one line what is neither a source nor a map of sources to shares."""
    names = list(found) if isinstance(found, Mapping) else [found]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"found {found!r}, allowed: a source ({KINDS}), or a map of sources to their shares")
    for name in names:
        if not name.isprintable():  # every message about it is to be one line
            raise ValueError(f"found {name!r}, which holds characters that cannot be shown")
    if not isinstance(found, Mapping):
        return found
    for name, share in found.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
            raise ValueError(f"the share of {name} is {share!r}, allowed: a number above 0")
    return {name: float(share) for name, share in found.items()}


class DataSpec(BaseModel):
    """Where tokens come from: `samples` windows of `length` tokens from one source, or from several by share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: Annotated[str | dict[str, Share], BeforeValidator(_source)] = Field(
        BUILTIN, description=f"{KINDS}; or a map of several to their shares of the windows."
    )
    samples: Annotated[int, Field(gt=0)] | None = Field(
        None, description="Number of windows; default all. Several sources and self need it."
    )
    length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens per window.")


def sources(spec: DataSpec) -> dict[str, float]:
    """The sources in the order of their names, and the share of each; the shares add up to one."""
    if isinstance(spec.source, str):
        return {spec.source: 1.0}
    total = math.fsum(spec.source.values())
    return {name: spec.source[name] / total for name in sorted(spec.source)}


def local_paths(spec: DataSpec) -> list[Path]:
    """The files and folders among the sources."""
    return [Path(name) for name in sources(spec) if name not in (BUILTIN, SELF) and not name.startswith(HUB)]


def counts(spec: DataSpec) -> dict[str, int | None]:
    """How many windows each source gives, None = all it has.

    Largest remainder: a source gives the whole part of its share of `samples`, and the windows left over go to the
    largest fractions, to the first name where they are equal. Raises UserError for several sources without `samples`,
    and for a share so small that it is no window.
    """
    shares = sources(spec)
    if len(shares) == 1:
        return dict.fromkeys(shares, spec.samples)
    if spec.samples is None:
        raise UserError(
            "several sources need samples, the number of windows that they share",
            hint="give samples (--samples), or name one source",
        )
    exact = {name: share * spec.samples for name, share in shares.items()}
    found = {name: math.floor(value) for name, value in exact.items()}
    by_fraction = sorted(exact, key=lambda name: (found[name] - exact[name], name))
    for name in by_fraction[: spec.samples - sum(found.values())]:
        found[name] += 1
    empty = [name for name, count in found.items() if count == 0]
    if empty:
        raise UserError(
            f"{empty[0]}: its share of {shares[empty[0]]:.4g} of {spec.samples} windows is none",
            hint="more samples, or a larger share",
        )
    return dict(found)


def parse_sources(given: Sequence[str]) -> str | dict[str, float]:
    """What `--data` means: one SPEC is that source; several, SPEC or SPEC=SHARE each, are sources by share.

    Without any share all are equal. Raises UserError for shares on some only, and for a source named twice.
    """
    pairs = [_share(text) for text in given]
    if len(pairs) == 1:
        return pairs[0][0]
    bare = [name for name, share in pairs if share is None]
    if bare and len(bare) < len(pairs):
        raise UserError(f"--data: {bare[0]} has no share, but others have; give all of them one, as in a.txt=0.5")
    found: dict[str, float] = {}
    for name, share in pairs:
        if name in found:
            raise UserError(f"--data: {name} is named twice")
        found[name] = 1.0 if share is None else share
    return found


def _share(text: str) -> tuple[str, float | None]:
    name, equals, number = text.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not equals or math.isnan(share):
        return text, None  # an equals sign of the name's own
    if not 0 < share < math.inf:
        raise UserError(f"--data: the share of {name} is {number}, allowed: a number above 0")
    return name, share
