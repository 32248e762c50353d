"""What a plan takes of the machine: memory and disk, pass by pass, and the refusal where there is too little.

Torch-free. A refusal names the step whose estimate is the largest, and what would make that one need less.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.arch import Family
from compress.checkpoint.disk import existing
from compress.checkpoint.headers import Header
from compress.data import SELF, expected_tokens
from compress.device import check_room_on
from compress.errors import MachineError, size
from compress.machine import Machine
from compress.recipe import Recipe
from compress.steps import STEPS, Lighter
from compress.steps.sampling import Author
from compress.steps.types import StepPlan

SPARE = 64 * 2**20  # bytes of disk left over for what is small: tokenizer, receipt, scores
EVALUATION = Lighter("fewer or shorter evaluation windows", ("data.evaluation.samples", "data.evaluation.length"))
OTHER_TEXT = Lighter("text that the model does not sample itself", ())


@dataclass(frozen=True)
class Share:
    """What one part of a plan takes. `what`: as in `1-prune`; `lighter`: what makes it need less, if anything does."""

    memory: int
    what: str
    lighter: Lighter | None


@dataclass(frozen=True)
class Needs:
    """Bytes of memory and of disk that a plan takes at most, and the part that takes the most memory of them."""

    memory: int
    disk: int
    largest: Share


def needs(
    recipe: Recipe, family: Family, before: Header, steps: Sequence[StepPlan], authors: Mapping[str, Author]
) -> Needs:
    """Memory of the largest pass, and of the evaluation that is held beside every one; disk of the largest pass."""
    done_together = passes(recipe)
    shares = [_share(steps, group) for group in done_together]
    shares += [Share(author.memory(), SELF, OTHER_TEXT) for author in authors.values()]
    most = max(shares, key=lambda share: share.memory)
    evaluation = _evaluation_memory(recipe, family, before)
    largest = Share(evaluation, "evaluation", EVALUATION) if evaluation > most.memory else most
    return Needs(most.memory + evaluation, max(disk(steps, done_together)) + SPARE, largest)


def passes(recipe: Recipe) -> tuple[tuple[int, ...], ...]:
    """Indices of the steps by the pass that does them: one each, but for a fused prune and quantize."""
    kinds = [entry.kind for entry in recipe.steps]
    found: list[tuple[int, ...]] = []
    for index, kind in enumerate(kinds):
        if not recipe.keep_intermediate and kind == "quantize" and index and kinds[index - 1] == "prune":
            found[-1] = (*found[-1], index)
        else:
            found.append((index,))
    return tuple(found)


def disk(steps: Sequence[StepPlan], done_together: Sequence[tuple[int, ...]]) -> list[int]:
    """Bytes that the work folder holds at most during each step."""
    held, found = 0, []
    for group in done_together:
        written = steps[group[-1]].nbytes
        states = max(steps[index].scratch for index in group)
        found += [held + written + states] * len(group)
        held = written
    return found


def check_room(
    found: Needs, machine: Machine, out: Path | None, name: Callable[[str], str], more: str | None = None
) -> None:
    """MachineError where memory or disk are too small; its hint says what helps, and `more`.

    `name`: what the user calls a key of a recipe.
    """
    available = machine.available_memory()
    if found.memory > available:
        raise MachineError(
            f"the plan needs about {size(found.memory)} of memory, most of all for {found.largest.what}; "
            f"{size(available)} are available",
            hint="; ".join(filter(None, (_what_helps(found.largest, name), more))),
        )
    check_room_on(machine, found.memory)
    check_disk(found.disk, out or Path.cwd(), "the plan")


def check_disk(needed: int, place: Path, what: str) -> None:
    """MachineError where fewer bytes are free than `what` needs at `place`, which need not exist."""
    folder = existing(place)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(f"{what} needs {size(needed)} of disk, {folder} has {size(free)} free")


def _what_helps(largest: Share, name: Callable[[str], str]) -> str:
    if largest.lighter is None:
        return f"{largest.what} holds one layer at a time; less text changes nothing"
    keys = ", ".join(name(key) for key in largest.lighter.keys)
    return f"what helps: {largest.lighter.what}" + (f" ({keys})" if keys else "")


def _share(steps: Sequence[StepPlan], group: tuple[int, ...]) -> Share:
    index = max(group, key=lambda index: steps[index].memory)
    kind = steps[index].kind
    lighter = STEPS[kind].lighter
    if lighter is not None:
        lighter = Lighter(lighter.what, tuple(key.format(step=f"steps.{index}.{kind}") for key in lighter.keys))
    return Share(sum(steps[i].memory for i in group), f"{index + 1}-{kind}", lighter)


def _evaluation_memory(recipe: Recipe, family: Family, before: Header) -> int:
    """Bytes of the final hidden states of the reference and of one stage, and of 512 tokens' logits of both."""
    if recipe.evaluate == "never":
        return 0
    sizes, tokens = family.sizes(before), expected_tokens(recipe.data.evaluation, "evaluation")
    return 2 * 4 * (tokens * sizes.hidden + 512 * sizes.vocab)
