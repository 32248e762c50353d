"""How units are ranked. One file a criterion, one function: `rank(unit_view, damping) -> Ranking`.

The table is torch-free: names, needs and papers are known and checked before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ranking:
    """`order` [units]: the units from the first to go to the last. `cost` [units]: what unit u costs, by unit, in
    the criterion's own measure."""

    order: torch.Tensor
    cost: torch.Tensor


@dataclass(frozen=True)
class GroupView:
    """What a criterion may look at for one group of one layer.

    reader [d, units*width]: the matrix whose input columns the units own. hessian [n, n]: Gram matrix of its inputs,
    None when no criterion or refit asked for it. owned: every weight slice a unit owns, each [units, ...] flattened.
    """

    name: str
    width: int
    reader: torch.Tensor
    hessian: torch.Tensor | None
    owned: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Criterion:
    """One entry of the table; `needs_gram`: it looks at activations."""

    name: str
    needs_gram: bool
    paper: str

    def load(self) -> Callable[[GroupView, float], Ranking]:
        """The ranking function; imports torch."""
        return cast(Callable[[GroupView, float], Ranking], import_module(f"compress.criteria.{self.name}").rank)


CRITERIA: dict[str, Criterion] = {
    entry.name: entry
    for entry in (
        Criterion(
            "wanda", True, "Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs; An et al. 2024 (sp)"
        ),
        Criterion("obs", True, "Hassibi & Stork 1993; Kurtic et al. 2023, ZipLM"),
        Criterion("magnitude", False, "Han et al. 2015; group L2 norm as in Fang et al. 2023, DepGraph"),
    )
}


def ranking_by_score(score: Any) -> Ranking:
    """A static score [units] as a ranking: ascending, ties by index."""
    import torch

    return Ranking(torch.argsort(score, stable=True), score)
