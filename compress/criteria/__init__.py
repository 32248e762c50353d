"""How units are ranked. One file a criterion, one function: `rank(unit_view, damping) -> Ranking`.

The table is torch-free: names, needs and papers are known and checked before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from compress.errors import UserError
from compress.stream import GRADIENTS, WHOLE, Statistic

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

    reader [d, units*width]: the matrix whose input columns the units own. owned: every weight slice a unit owns, each
    [units, ...] flattened. statistics: all that the criterion needs, of the reader's inputs (stream/statistics.py) and
    of the dense model's gradients (stream/backward.py).
    seed: what a criterion that draws begins with: the recipe's seed, the layer and the group, and nothing that a
    resumed run or another number of threads would change.
    """

    name: str
    width: int
    reader: torch.Tensor
    owned: tuple[torch.Tensor, ...]
    statistics: Mapping[Statistic, torch.Tensor]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Criterion:
    """One entry of the table; `needs`: the statistics that it looks at, which are gathered for it."""

    name: str
    needs: frozenset[Statistic]
    paper: str

    @property
    def module(self) -> str:
        """The file in this folder that holds it."""
        return self.name.replace("-", "_")

    def load(self) -> Callable[[GroupView, float], Ranking]:
        """The ranking function; imports torch."""
        return cast(Callable[[GroupView, float], Ranking], import_module(f"compress.criteria.{self.module}").rank)


CRITERIA: dict[str, Criterion] = {
    entry.name: entry
    for entry in (
        Criterion(
            "wanda",
            frozenset({"square"}),
            "Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs; An et al. 2024 (sp)",
        ),
        Criterion("obs", frozenset({"gram"}), "Hassibi & Stork 1993; Kurtic et al. 2023, ZipLM"),
        Criterion(
            "flap",
            frozenset({"variance"}),
            "An et al. 2024, Fluctuation-based Adaptive Structured Pruning for LLMs, arXiv:2312.11983",
        ),
        Criterion(
            "activation",
            frozenset({"activity"}),
            "Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation (Minitron), "
            "arXiv:2407.14679",
        ),
        Criterion(
            "taylor",
            frozenset({"taylor"}),
            "Ma et al. 2023, LLM-Pruner: On the Structural Pruning of Large Language Models, arXiv:2305.11627",
        ),
        Criterion(
            "fisher",
            frozenset({"fisher"}),
            "Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers, arXiv:2204.09656",
        ),
        Criterion(
            "tp-magnitude", frozenset({"tp_magnitude"}), "Fang et al. 2023, DepGraph, arXiv:2301.12900: its code"
        ),
        Criterion("tp-taylor", frozenset({"tp_taylor"}), "Fang et al. 2023, DepGraph, arXiv:2301.12900: its code"),
        Criterion("magnitude", frozenset(), "Han et al. 2015; group L2 norm as in Fang et al. 2023, DepGraph"),
        Criterion(
            "random",
            frozenset(),
            "a control, as Blalock et al. 2020, What is the State of Neural Network Pruning?, ask for",
        ),
    )
}


def ranking_of(criterion: Criterion, view: GroupView, damping: float) -> Ranking:
    """The criterion's ranking; UserError when a cost is no number, because then their order means nothing."""
    import torch

    ranking = criterion.load()(view, damping)
    if not bool(torch.isfinite(ranking.cost).all()):
        slopes = criterion.needs & (GRADIENTS | {"tp_taylor"})
        what = "gradients" if slopes else "activations" if criterion.needs - WHOLE else "weights"
        raise UserError(f"{view.name}: costs by {criterion.name} are NaN or infinite: {what} overflow")
    return ranking


def ranking_by_score(score: Any) -> Ranking:
    """A static score [units] as a ranking: ascending, ties by index."""
    import torch

    return Ranking(torch.argsort(score, stable=True), score)
