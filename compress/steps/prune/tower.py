"""How many blocks of the vision tower and neurons of its merger stay, or one clear line why not. From headers.

Which blocks and neurons go is found when the step runs (vision.py): from the images of the calibration, where there is
anything to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.arch import Family
from compress.arch.tower import Tower, TowerSizes
from compress.checkpoint.headers import DTYPE_BYTES, Header
from compress.criteria import CRITERIA
from compress.data import DataSpec, pictures_of
from compress.errors import MachineError, UserError
from compress.limits import DOUBLE_UP_TO
from compress.steps.prune.ahead import sight_memory
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.widths import TOWER
from compress.steps.types import Complain, PlanContext
from compress.stream import GRADIENTS, WHOLE, Statistic

VISION_LAYER_CRITERIA = ("angular", "influence")  # vision.py computes them
SEEN = "give calibration data with images: a .jsonl file of chats (docs/data.md)"

NONE = TowerSizes(0, 0, 0)


@dataclass(frozen=True)
class TowerLeft:
    """What stays of a vision tower of the sizes `whole`: the first `depth` blocks, which stand for any until the step
    runs, and `ffn` neurons of its merger. `tower` is None where all stays, and nothing is to be done.

    memory: bytes at its peak while it is cut, before any allowance; held: of what is made of it, while the decoder is
    pruned.
    """

    tower: Tower | None = None
    whole: TowerSizes = NONE
    depth: int = 0
    ffn: int = 0
    memory: int = 0
    held: int = 0
    notes: tuple[str, ...] = ()

    def cut(self, header: Header) -> Header:
        """`header` with what stays; itself where all does."""
        return header if self.tower is None else self.tower.cut(header, self.depth, self.ffn)

    def gone(self, header: Header) -> int:
        """Parameters that go from `header`."""
        sides = (header, self.cut(header))
        whole, left = (sum(spec.parameters for spec in side.tensors.values()) for side in sides)
        return whole - left


WHOLE_TOWER = TowerLeft()


def wanted(criterion: str, refit: bool) -> frozenset[Statistic]:
    """What is gathered of the merger's inputs."""
    return CRITERIA[criterion].needs | frozenset[Statistic]({"gram"} if refit else ())


def tower_left(
    before: Header, family: Family, options: PruneOptions, criterion: str, context: PlanContext, complain: Complain
) -> TowerLeft | None:
    """What stays of the vision tower; None after a complaint. `criterion`: by which units are ranked."""
    given = [key for key in TOWER if getattr(options, key) is not None]
    if not given:
        return TowerLeft()
    tower = family.tower
    if tower is None:
        what = "has a vision tower of a kind that is not cut" if "vision_config" in before.config else "has none"
        for key in given:
            complain(key, f"a {family.name} {what}; vision towers of glm4v and glm46v are")
        return None
    if (unlike := tower.unlike(before)) is not None:
        complain(given[0], unlike)
        return None
    sizes = tower.sizes(before.config)
    left = _sizes(tower, sizes, options, complain)
    if left is None or left.tower is None:
        return left
    data, needs = context.data["calibration"], wanted(criterion, options.refit)
    if not _can_be_found(left, options, criterion, _images(data), complain):
        return None
    narrower = left.ffn < sizes.ffn
    parts = [_depth_note(left, options)] if left.depth < sizes.depth else []
    parts += [_ffn_note(left, options, criterion)] if narrower else []
    goes = left.gone(before)
    nbytes = goes * DTYPE_BYTES[before.dtype]
    notes = (*parts, f"vision tower: {goes:,} parameters go, {nbytes:,} bytes in {before.dtype}")
    return TowerLeft(
        tower,
        sizes,
        left.depth,
        left.ffn,
        memory=_memory(before, family, options, data, sizes, narrower and "gram" in needs),
        held=3 * sizes.width * left.ffn * DTYPE_BYTES[before.dtype] if narrower else 0,
        notes=notes,
    )


def _sizes(tower: Tower, sizes: TowerSizes, options: PruneOptions, complain: Complain) -> TowerLeft | None:
    """The counts that the options give, complained about where the tower has fewer."""
    wrong = False
    found = []
    for key, whole, noun in zip(TOWER, (sizes.depth, sizes.ffn), ("vision layers", "neurons"), strict=True):
        keep = getattr(options, key)
        keep = whole if keep is None else keep
        if keep > whole:
            where = "the vision tower" if key == TOWER[0] else "the FFN of its vision tower's merger"
            complain(key, f"{keep} {noun} cannot stay: {where} has {whole}")
            wrong = True
        found.append(keep)
    if wrong:
        return None
    depth, ffn = found
    return TowerLeft() if (depth, ffn) == (sizes.depth, sizes.ffn) else TowerLeft(tower, sizes, depth, ffn)


def _images(data: DataSpec) -> bool:
    """Whether calibration data show images; true where that cannot be read, which is told where data are checked."""
    try:
        return bool(pictures_of(data))
    except (UserError, MachineError):
        return True


def _can_be_found(left: TowerLeft, options: PruneOptions, criterion: str, images: bool, complain: Complain) -> bool:
    """Whether there is a way to find what goes: complaints where there is none."""
    fine = True

    def refuse(key: str, message: str, hint: str | None = None) -> None:
        nonlocal fine
        complain(key, message, hint)
        fine = False

    layers, ffn = TOWER
    if left.depth < left.whole.depth:
        if options.layer_criterion not in VISION_LAYER_CRITERIA:
            known = " or ".join(VISION_LAYER_CRITERIA)
            refuse("layer_criterion", f"vision layers go by {known}, not by {options.layer_criterion}")
        if not images:
            refuse(layers, "which vision layers go is found on images, and the calibration data have none", SEEN)
    if left.ffn < left.whole.ffn:
        needs = wanted(criterion, options.refit)
        if needs & (GRADIENTS | WHOLE):
            known = ", ".join(name for name, each in CRITERIA.items() if not each.needs & (GRADIENTS | WHOLE))
            refuse("criterion", f"{criterion} does not rank the neurons of a vision merger; what does: {known}")
        elif needs and not images:
            free = ", ".join(name for name, each in CRITERIA.items() if not each.needs)
            why = f"{criterion} looks at them" if CRITERIA[criterion].needs else "the refit looks at them"
            refuse(
                ffn,
                f"{why}, and the calibration data have no images",
                f"{SEEN}; or rank without any: criterion {free}, and refit: false (--no-refit)",
            )
    return fine


def _depth_note(left: TowerLeft, options: PruneOptions) -> str:
    how = f"which ones is found on the calibration's images ({options.layer_criterion})"
    return f"vision tower: {left.depth} of {left.whole.depth} layers stay; {how}"


def _ffn_note(left: TowerLeft, options: PruneOptions, criterion: str) -> str:
    how = f"ranked by {criterion}{', with refit' if options.refit else ''}"
    return f"vision tower: {left.ffn} of {left.whole.ffn} FFN neurons of the merger stay, {how}"


def _memory(
    before: Header, family: Family, options: PruneOptions, data: DataSpec, sizes: TowerSizes, gram: bool
) -> int:
    """Bytes: the tower with an image in it and Gram matrices, where some are taken; or, once it is emptied, those, what
    the solver makes of them, and the merger before and after in float32."""
    try:
        seen = sight_memory(before, family, data)
    except (UserError, MachineError):
        seen = 0
    merger = 3 * sizes.width * sizes.ffn * 4
    grams = 4 * sizes.ffn**2 * (1 if options.held_out is None else 2) if gram else 0
    solver = 3 * sizes.ffn**2 * (8 if sizes.ffn <= DOUBLE_UP_TO else 4) + 4 * sizes.width * sizes.ffn * 4
    return grams + max(seen, 2 * merger + (solver if gram else 0))
