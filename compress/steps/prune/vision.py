"""The vision tower, cut before the decoder is: which blocks go, which neurons of the merger, and its refit, on the
images of the calibration. The decoder then sees what the cut tower makes of them.

The tower is filled once, every image passes through it alone. Memory: the tower, one image in it, and the statistics of
what the merger's last matrix reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from compress.arch.tower import VISION_FFN, Tower
from compress.checkpoint.headers import Header
from compress.checkpoint.ledger import State
from compress.checkpoint.reader import Reader
from compress.criteria import CRITERIA, Ranking, ranking_of
from compress.data import processor_of
from compress.device import device_of
from compress.errors import UserError
from compress.limits import ENOUGH
from compress.solve import HeldOut, best_damping, cut_error, damping_vector, refit
from compress.steps.prune.depth import Depth
from compress.steps.prune.depth import restored as restored_depth
from compress.steps.prune.enough import few_tokens, windows_back
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.steps.prune.scores import Chosen, Errors
from compress.steps.prune.surgery import check_range, cut, select, view
from compress.steps.prune.tower import SEEN, TowerLeft, wanted
from compress.steps.prune.vision_depth import METHODS
from compress.steps.prune.widths import TOWER
from compress.steps.types import Job
from compress.stream import Statistic
from compress.stream.forward import Stream, compute_dtype
from compress.stream.statistics import Gathered
from compress.stream.vision import Images, Sight, filled, looked_at

STATE = "vision."  # what the tensors of a run's state and of importance.safetensors begin with
WHAT = "vision merger"


@dataclass(frozen=True)
class CutTower:
    """A source `folder` with the vision tower that stays: `header` says where the tensors of the blocks lie that do,
    `made` holds those of the merger. depth, ffn: what was chosen and why, None where all stay. tokens: of the images
    that the merger was ranked or refitted on."""

    folder: Path
    header: Header
    made: Mapping[str, torch.Tensor] = field(default_factory=dict)
    depth: Depth | None = None
    ffn: Chosen | None = None
    criterion: str = ""
    tokens: int = 0

    def reader(self, device: str = "cpu") -> Reader:
        """The checkpoint in `folder` as a reader, with this tower."""
        return _Cut(self.folder, self.header, device, self.made)

    def document(self) -> dict[str, Any]:
        """For the receipt, importance.json and the state of a run; nothing where all stays."""
        said: dict[str, Any] = {}
        if self.depth is not None:
            said["layers"] = self.depth.document()
        if self.ffn is not None:
            said["ffn"] = {
                "units": len(self.ffn.ranking.order),
                "keep": len(self.ffn.keep),
                "criterion": self.criterion,
                "paper": CRITERIA[self.criterion].paper,
                "image_tokens": self.tokens,
                "relative_output_error": self.ffn.errors.document(),
            }
        return {"vision": said} if said else {}

    def scores(self) -> dict[str, torch.Tensor]:
        """`vision.ffn.{cost,order,keep}`: float32 and int32."""
        if self.ffn is None:
            return {}
        return {
            f"{STATE}ffn.cost": self.ffn.ranking.cost.to(torch.float32).contiguous(),
            f"{STATE}ffn.order": self.ffn.ranking.order.to(torch.int32),
            f"{STATE}ffn.keep": self.ffn.keep.to(torch.int32),
        }

    def kept(self) -> State:
        """For the state of a run."""
        made = {f"{STATE}{name}": value for name, value in self.made.items()}
        return State(self.document(), {**self.scores(), **made})


class _Cut(Reader):
    """See `CutTower.reader`."""

    def __init__(self, folder: Path, header: Header, device: str, made: Mapping[str, torch.Tensor]) -> None:
        super().__init__(folder, header, device)
        self._made = made

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._placed(self._made[name], dtype) if name in self._made else super().tensor(name, dtype)

    def rows(self, name: str, index: Sequence[int] | slice, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._placed(self._made[name][index], dtype) if name in self._made else super().rows(name, index, dtype)

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        return iter((self._made[name].flatten(),)) if name in self._made else super().chunks(name)


@torch.no_grad()
def cut_tower(job: Job, sight: Sight) -> CutTower:
    """What the plan leaves of the vision tower, found on the images of the calibration; what an earlier run of the same
    step has found is taken over. The source as it is where all stays.

    UserError where images are needed and the windows have none, or fewer of their tokens than a Gram matrix has columns
    (unless `force`), for activations that are NaN or infinite, and for an image that can no longer be read.
    """
    plan = cast(PrunePlan, job.plan)
    left = plan.tower
    if left.tower is None:
        return CutTower(job.source, plan.before)
    state = None if job.ledger is None else job.ledger.load()
    if state is not None and state.facts.get("vision"):
        return _restored(job, left, state.facts["vision"], state.tensors)
    found = _found(job, plan, left, left.tower, sight.images)
    if found.depth is not None:
        job.progress.note(f"vision {found.depth.told()}")
    if job.ledger is not None and job.ledger.due():
        kept = found.kept()
        job.ledger.save(kept.facts, kept.tensors)
    return found


def _found(job: Job, plan: PrunePlan, left: TowerLeft, tower: Tower, images: Images) -> CutTower:
    options = cast(PruneOptions, plan.options)
    narrower = left.ffn < left.whole.ffn
    needs = wanted(plan.criterion, options.refit) if narrower else frozenset[Statistic]()
    tokens = _tokens(job, images, left, needs, options)
    depth: Depth | None = None
    gathered: _Gathered | None = None
    with Reader(job.source, plan.before, device_of(job.machine)) as reader:
        if needs or left.depth < left.whole.depth:
            stream = Stream(reader, job.family, dtype=compute_dtype(plan.before.dtype, reader.device)[0])
            with filled(stream) as module:
                if left.depth < left.whole.depth:
                    depth = _depth(job, stream, module.get_submodule(tower.blocks), left, options, images)
                    stay = [module.get_submodule(f"{tower.blocks}.{index}") for index in depth.kept]
                    module.set_submodule(tower.blocks, nn.ModuleList(stay))
                if needs:
                    gathered = _Gathered(needs, left, options, images, reader.device)
                    merger = module.get_submodule(tower.merger)
                    gathered.see(merger.get_submodule(tower.group(left.whole).reader), stream, images, job)
        ffn, made = _narrowed(job, plan, left, tower, reader, gathered) if narrower else (None, {})
    kept = range(left.depth) if depth is None else depth.kept
    header = _header(plan.before, left, tower, kept)
    return CutTower(job.source, header, made, depth, ffn, plan.criterion, tokens if needs else 0)


def _tokens(job: Job, images: Images, left: TowerLeft, needs: frozenset[Statistic], options: PruneOptions) -> int:
    """The tokens of all images; UserError for none, for too few for a Gram matrix, and where those of the windows that
    are held back are all, or none."""
    if not any(images):
        if needs or left.depth < left.whole.depth:
            key = TOWER[0] if left.depth < left.whole.depth else TOWER[1]
            raise UserError(f"{key}: no calibration window shows an image", hint=SEEN)
        return 0
    processor = processor_of(job.source)
    each = [sum(processor.tokens(processor.grid_of(image)) for image in window) for window in images]
    tokens = sum(each)
    if "gram" in needs:
        back = windows_back(options, len(images))
        if back and not 0 < (held := sum(each[-back:])) < tokens:
            which = "all" if held else "none"
            said = f"held_out: the last {back} of {len(images)} windows, held back, have {which} of the images"
            raise UserError(said, hint="more samples, or another held_out")
        if not options.force and (wrong := few_tokens(tokens, left.whole.ffn, " of images")) is not None:
            raise wrong
        few = tokens < ENOUGH * left.whole.ffn
        poor = f" (under {ENOUGH}: the refit will be poor; give more images)" if few else ""
        job.progress.note(f"{WHAT}: {tokens} tokens of images, {tokens / left.whole.ffn:.1f} per column{poor}")
    return tokens


def _depth(
    job: Job, stream: Stream, blocks: nn.Module, left: TowerLeft, options: PruneOptions, images: Images
) -> Depth:
    """Which blocks stay, by `options.layer_criterion` over the patches of all images."""
    method = METHODS[options.layer_criterion]
    scores = method(list(blocks.children()), left.whole.depth - left.depth, sum(map(len, images)))
    with scores.watching():
        for _ in looked_at(stream, images, job.progress, "comparing vision layers"):
            scores.seen()
    kept, found = scores.result()
    return Depth(options.layer_criterion, left.whole.depth, tuple(kept), tuple(found))


class _Gathered:
    """Statistics of what the merger's last matrix reads of all images, and a Gram matrix of those in the windows that
    are held back, the last ones."""

    def __init__(
        self, needs: frozenset[Statistic], left: TowerLeft, options: PruneOptions, images: Images, device: str
    ) -> None:
        self._back = windows_back(options, len(images))
        self._all = Gathered(needs, left.whole.ffn, 1, device)
        self._held = Gathered({"gram"}, left.whole.ffn, 1, device) if self._back else None
        self._tokens, self._held_tokens = 0, 0

    def see(self, reader: nn.Module, stream: Stream, images: Images, job: Job) -> None:
        """Pass all images through the tower that `reader` is in."""
        inputs: list[torch.Tensor] = []
        handle = reader.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            for (row, _), _ in looked_at(stream, images, job.progress, "images through the cut vision layers"):
                self._add(inputs.pop().flatten(0, -2)[None], row >= len(images) - self._back)
        finally:
            handle.remove()

    def _add(self, inputs: torch.Tensor, held: bool) -> None:
        """Of one image [1, tokens, n]."""
        self._all.add(inputs)
        self._tokens += inputs.shape[1]
        if self._held is not None and held:
            self._held.add(inputs)
            self._held_tokens += inputs.shape[1]

    def results(self) -> tuple[dict[Statistic, torch.Tensor], HeldOut | None]:
        """The statistics, and those held back."""
        if self._held is None:
            return self._all.results(), None
        return self._all.results(), HeldOut(self._held.results()["gram"], self._held_tokens / self._tokens)


def _narrowed(
    job: Job, plan: PrunePlan, left: TowerLeft, tower: Tower, reader: Reader, gathered: _Gathered | None
) -> tuple[Chosen, dict[str, torch.Tensor]]:
    """Which neurons of the merger stay, and its tensors, in the machine's own memory, under their names on disk."""
    options, group = cast(PruneOptions, plan.options), tower.group(left.whole)
    tensors = {c.tensor: reader.tensor(tower.behind + c.tensor) for c in group.cuts}
    statistics, held = ({}, None) if gathered is None else gathered.results()
    seen = view(tensors, group, statistics, WHAT, (job.seed, *VISION_FFN.encode()))
    ranking = ranking_of(CRITERIA[plan.criterion], seen, options.damping)
    keep = select(ranking, group, left.ffn)
    made = cut(tensors, group, keep)
    errors = Errors(None, None, None, None)
    if (hessian := statistics.get("gram")) is not None:
        if options.refit:
            damping, missed = options.damping, None
            if held is not None:
                damping, missed = best_damping(seen.reader, hessian, keep, held, WHAT)
            fit = refit(seen.reader, hessian, keep, damping_vector(hessian, damping), WHAT)
            name = f"{group.reader}.weight"
            made[name] = fit.weight.to(made[name].dtype)
            errors = Errors(fit.error, fit.error_before, missed, damping)
        else:
            error = cut_error(seen.reader, hessian, keep)
            errors = Errors(error, error, None, None)
    chosen = Chosen(Ranking(ranking.order.cpu(), ranking.cost.cpu()), keep.cpu(), errors)
    for name, value in made.items():
        check_range(tower.behind + name, value)
    return chosen, {tower.behind + name: value.cpu().contiguous() for name, value in made.items()}


def _header(before: Header, left: TowerLeft, tower: Tower, kept: Sequence[int]) -> Header:
    """`before` with the tower that stays: its blocks are those of the source that are `kept`, where they lie."""
    planned = left.cut(before)

    def origin(name: str) -> str:
        if not name.startswith(tower.inside):
            return name
        index, _, inner = name.removeprefix(tower.inside).partition(".")
        return f"{tower.inside}{kept[int(index)]}.{inner}"

    return replace(planned, locations={name: before.locations[origin(name)] for name in planned.tensors})


def _restored(job: Job, left: TowerLeft, said: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> CutTower:
    """What `CutTower.kept` were made from."""
    tower, before = left.tower, job.plan.before
    assert tower is not None
    depth = restored_depth(said["layers"]) if "layers" in said else None
    header = _header(before, left, tower, range(left.depth) if depth is None else depth.kept)
    if "ffn" not in said:
        return CutTower(job.source, header, depth=depth)
    ffn = said["ffn"]
    order, cost, keep = (state[f"{STATE}ffn.{kind}"] for kind in ("order", "cost", "keep"))
    chosen = Chosen(Ranking(order.long(), cost), keep.long(), Errors(**ffn["relative_output_error"]))
    prefix = f"{STATE}{tower.behind}"
    made = {name.removeprefix(STATE): value for name, value in state.items() if name.startswith(prefix)}
    return CutTower(job.source, header, made, depth, chosen, ffn["criterion"], ffn["image_tokens"])
