"""Two methods judged on the same windows: the mean of the differences, and how far chance alone may move it.

The windows' own spread is many times what 8 bits change; it cancels in the differences. Their mean over N windows has
the standard error s / sqrt(N), s the sample standard deviation (N - 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NOISE = 2.0  # standard errors


@dataclass(frozen=True)
class Paired:
    """`mean`: of one minus other over `windows`; `error`: its standard error, in the same unit."""

    mean: float
    error: float
    windows: int

    @property
    def noise(self) -> bool:
        """Whether a difference as large as this may well be chance."""
        return abs(self.mean) <= NOISE * self.error

    def __str__(self) -> str:
        where = "within" if self.noise else "beyond"
        return f"{self.mean:+.2e} +- {self.error:.1e} nats a token over {self.windows} windows, {where} noise"


def paired(one: Sequence[float], other: Sequence[float]) -> Paired:
    """`one` minus `other`, window by window; ValueError for fewer than two windows, or not as many in both."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} windows: a standard error takes two")
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Paired(statistics.fmean(differences), error, len(differences))
