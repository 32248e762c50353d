"""What the pass over the layers gathers, by what is cut and how: from the plan, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from compress.arch import Family, Group
from compress.arch.kv import KV_HEADS
from compress.criteria import CRITERIA
from compress.steps.prune.decoder import layers_of
from compress.steps.prune.options import DROP, PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.stream import GRADIENTS, WHOLE, Statistic


def groups_cut(plan: PrunePlan, family: Family) -> list[list[Group]]:
    """The groups that lose units, of every layer that stays; where layers go, all are alike."""
    layers = zip(layers_of(plan.before, family), plan.keep, strict=False)
    return [[group for group in layer.groups.values() if keep[group.name] < group.units] for layer, keep in layers]


def needs(plan: PrunePlan) -> frozenset[Statistic]:
    """What the criterion ranks by, where no sensitivity folder did."""
    return CRITERIA[plan.criterion].needs if plan.measured is None else frozenset()


def gathered(plan: PrunePlan, groups: Sequence[Sequence[Group]]) -> frozenset[Statistic]:
    """The statistics of the groups' inputs that ranking and refit take."""
    refits: frozenset[Statistic] = frozenset({"gram"} if cast(PruneOptions, plan.options).refit else ())
    return (needs(plan) - GRADIENTS - WHOLE) | refits if any(groups) else frozenset()


def widest(plan: PrunePlan, family: Family) -> int:
    """Columns of the widest Gram matrix that is gathered, or that merged KV heads are refitted by; 0 without any."""
    options, groups = cast(PruneOptions, plan.options), groups_cut(plan, family)
    columns = [0]
    if "gram" in gathered(plan, groups):
        columns += [group.units * group.width for layer in groups for group in layer]
    sizes = family.sizes(plan.before)
    merged = plan.keep[0].get(KV_HEADS, sizes.kv_heads) < sizes.kv_heads and options.kv_merge != DROP
    if merged and options.refit:
        columns.append(sizes.heads * sizes.head_dim)
    return max(columns)
