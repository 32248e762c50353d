"""Which decoder layers go: one pass through the whole model, in which what goes into and comes out of every layer is
compared, or the model without each layer is run beside the whole one.

Memory: the hidden states of all windows and, of one more layer than go, inputs at DEPTH_POSITIONS positions; by loss,
the hidden states of the first `layer_samples` windows, once more than there are layers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from compress.checkpoint.ledger import State
from compress.checkpoint.per_layer import anchored
from compress.checkpoint.reader import Reader
from compress.errors import UserError
from compress.limits import DEPTH_POSITIONS
from compress.machine import Progress
from compress.steps.prune.options import LAYER_CRITERIA, PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.steps.types import Job, StepPlan
from compress.stream.calls import listens
from compress.stream.forward import Stream, check_numbers, compute_dtype
from compress.stream.loss import mean_loss
from compress.stream.shown import Shown
from compress.stream.stock import told
from compress.stream.vision import Sight


@dataclass(frozen=True)
class Depth:
    """Which of the `layers` decoder layers of the source are `kept`, ascending. `scores`, by `criterion`: of each
    layer, or of each block of as many layers as go, by its first; by loss nats a token."""

    criterion: str
    layers: int
    kept: tuple[int, ...]
    scores: tuple[float, ...]

    def told(self) -> str:
        """`layers 3, 21-24 go, by angular`."""
        gone: list[int] = self.document()["gone"]
        what = f"layers {_spans(gone)} go" if len(gone) > 1 else f"layer {gone[0]} goes"
        return f"{what}, by {self.criterion}"

    def document(self) -> dict[str, Any]:
        """For the receipt, importance.json and the state of a run; `restored` reads it."""
        return {
            "criterion": self.criterion,
            "paper": LAYER_CRITERIA[self.criterion],
            "layers": self.layers,
            "kept": list(self.kept),
            "gone": [index for index in range(self.layers) if index not in self.kept],
            "scores": list(self.scores),
        }


def restored(said: Mapping[str, Any]) -> Depth:
    """What `Depth.document` was made from."""
    return Depth(said["criterion"], said["layers"], tuple(said["kept"]), tuple(said["scores"]))


def find_depth(job: Job, streamed: Reader, ids: torch.Tensor, sight: Sight, beside: State) -> Depth | None:
    """What the plan leaves to be found: the layers that stay; None when all do. `ids` [N, L]: the calibration, with the
    images that `sight` tells. `beside`: what was found before, and is kept with it.

    What an earlier run of the same step has found is taken over. UserError where activations are NaN or infinite.
    """
    plan = cast(PrunePlan, job.plan)
    options = cast(PruneOptions, plan.options)
    layers = job.family.sizes(plan.before).layers
    if plan.layers == layers:
        return None
    state = None if job.ledger is None else job.ledger.load()
    if state is not None and state.facts.get("depth"):
        return restored(state.facts["depth"])
    stream = Stream(streamed, job.family, dtype=compute_dtype(plan.before.dtype, streamed.device)[0])
    first = anchored(plan.before.config)
    # calibration windows are in seeded order: the first ones are as good as any
    count = options.layer_samples if options.layer_criterion == "loss" else len(ids)
    shown = Shown(stream, ids[:count], sight.first(count))
    kept, scores = METHODS[options.layer_criterion](shown, layers - plan.layers, first, job.progress)
    found = Depth(options.layer_criterion, layers, tuple(kept), tuple(scores))
    job.progress.note(f"decoder {found.told()}")
    if job.ledger is not None and job.ledger.due():
        job.ledger.save({"depth": found.document(), **beside.facts}, beside.tensors)
    return found


def settled(job: Job, depth: Depth | None) -> Job:
    """`job` with the config of the layers that stay in its plans, which until now stood for any."""
    if depth is None:
        return job
    config = job.family.shallow(told(job.family, job.plan.before), depth.kept)

    def of(plan: StepPlan) -> StepPlan:
        return replace(plan, after=job.family.with_lists(plan.after, config))

    return replace(job, plan=of(job.plan), pack=None if job.pack is None else of(job.pack))


def check_places(job: Job, reader: Reader, depth: Depth | None) -> None:
    """UserError where a layer of a traced family gives something else in the place that it gets: its class may compute
    with the number of a layer, or of all layers. The proof on a small instance has only the first few of them."""
    family = job.family
    if depth is None or not family.traced:
        return
    moved = [(old, new) for new, old in enumerate(depth.kept) if old != new]
    config = family.shallow(told(family, job.plan.before), depth.kept)
    before, after = (Stream(reader, family, dtype=torch.float32, config=said) for said in (None, config))
    hidden = torch.randn(1, 8, family.sizes(reader.header).hidden, generator=torch.Generator().manual_seed(0))
    with job.progress.task("layers in their new places", len(moved)) as task:
        for old, new in moved:
            prefix = family.prefix(old)
            names = [name for name in reader.header.tensors if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): reader.tensor(name) for name in names}
            expected, found = _passed(before, old, tensors, hidden), _passed(after, new, tensors, hidden)
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise UserError(
                    f"keep_layers: layer {old} of a {family.name} gives something else as layer {new}: it computes "
                    "with its number, or with how many there are"
                )
            task.advance()


def _passed(stream: Stream, index: int, tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """What layer `index` with these `tensors` makes of `hidden`."""
    out = hidden.clone()
    with stream.layer_from(index, tensors) as layer:
        stream.advance(layer, out)
    return out


def _angular(shown: Shown, gone: int, anchor: int, progress: Progress) -> tuple[list[int], list[float]]:
    """The block of `gone` layers whose input and output are the closest (Gromov et al. 2024, arXiv:2403.17887).

    Eq. 3-4: d(l) = arccos(x_l . x_{l+n} / |x_l| |x_{l+n}|) / pi, and the block with the least d goes. The paper takes
    the last token of every example; here each window gives as many positions as fit in DEPTH_POSITIONS, evenly spaced
    over the later half of what is no padding, the last among them: tokens that have seen much, of which a calibration
    has more.
    """
    each = max(1, min(DEPTH_POSITIONS // len(shown.ids), shown.ids.shape[1] // 2))
    lengths = shown.lengths[: min(len(shown.ids), DEPTH_POSITIONS), None]
    positions = lengths - 1 - (lengths // 2) * torch.arange(each) // each  # [windows, each]
    windows = torch.arange(len(lengths))[:, None]
    inputs: deque[torch.Tensor] = deque()
    distances: list[float] = []

    def see(hidden: torch.Tensor) -> None:
        inputs.append(hidden[windows, positions].float())
        if len(inputs) > gone:
            angle = _cosine(inputs.popleft(), inputs[-1]).clamp(-1, 1).arccos()
            distances.append(float(angle.mean()) / math.pi)

    def step(layer: nn.Module) -> None:
        shown.advance(layer, hidden)
        see(hidden)

    hidden = shown.begin(progress)
    see(hidden)
    _through(shown, hidden, progress, step)
    first = min(range(anchor, len(distances)), key=distances.__getitem__)
    return [index for index in range(shown.stream.layers) if not first <= index < first + gone], distances


def _influence(shown: Shown, gone: int, anchor: int, progress: Progress) -> tuple[list[int], list[float]]:
    """The `gone` layers of least Block Influence (Men et al. 2024, ShortGPT, arXiv:2403.03853, eq. 1).

    BI = 1 - E[x . y / |x| |y|] over all positions but padding, x what goes into a layer and y what comes out.
    """
    influence: list[float] = []
    hidden, tokens = shown.begin(progress), int(shown.lengths.sum())

    def see(layer: nn.Module) -> None:
        total = torch.zeros((), dtype=torch.float64, device=shown.stream.device)
        passed = 0

        def compare(module: nn.Module, given: tuple[torch.Tensor, ...], out: Any) -> None:
            nonlocal passed
            if listens(module):
                return
            same = _cosine(given[0], out if isinstance(out, torch.Tensor) else out[0])
            if shown.real is not None:
                same = same * shown.real[passed : passed + len(same)].to(same.device)
            passed += len(same)
            total.add_(same.sum(dtype=torch.float64))

        handle = layer.register_forward_hook(compare)
        try:
            shown.advance(layer, hidden)
        finally:
            handle.remove()
        influence.append(1 - float(total) / tokens)

    _through(shown, hidden, progress, see)
    return _without_the_least(influence, gone, anchor), influence


def _loss(shown: Shown, gone: int, anchor: int, progress: Progress) -> tuple[list[int], list[float]]:
    """The `gone` layers of which the model misses each alone the least (Kim et al. 2024, Shortened LLaMA,
    arXiv:2402.02834: the perplexity criterion, one-shot).

    A layer's score is how much the loss rises, in nats a token, where the identity takes its place. The models without
    one layer pass through the layers side by side: that without layer i leaves the whole one at layer i, so that every
    layer is read once and run for as many as have left before it, and for the whole one. Images are seen, and neither
    they nor padding are predicted.
    """
    whole, without = shown.begin(progress), list[torch.Tensor]()

    def step(layer: nn.Module) -> None:
        past = whole.clone()
        for hidden in (whole, *without):
            shown.advance(layer, hidden)
        without.append(past)

    _through(shown, whole, progress, step, "running the model without each layer")
    losses: list[float] = []
    with progress.task("losses without each layer", 1 + len(without)) as task:
        for hidden in (whole, *without):
            losses.append(mean_loss(shown.stream, shown.stream.norm(hidden), shown.ids, shown.sight.counted))
            task.advance()
    if not math.isfinite(losses[0]):
        raise UserError("the model's loss is NaN or infinite: its logits overflow")
    rises = [loss - losses[0] for loss in losses[1:]]
    for index, rise in enumerate(rises):
        if not math.isfinite(rise):
            raise UserError(f"layer {index}: without it the loss is NaN or infinite: activations overflow")
    return _without_the_least(rises, gone, anchor), rises


def _without_the_least(scores: Sequence[float], gone: int, anchor: int) -> list[int]:
    """The layers that stay where the `gone` of least score go, none of the first `anchor` among them."""
    order = sorted(range(anchor, len(scores)), key=scores.__getitem__)
    return [*range(anchor), *sorted(order[gone:])]


def _through(
    shown: Shown,
    hidden: torch.Tensor,
    progress: Progress,
    see: Callable[[nn.Module], object],
    label: str = "comparing layers",
) -> None:
    """Call `see`, which passes `hidden` on in place, with every layer. UserError where one gives what is no number."""
    with progress.task(label, shown.stream.layers) as task:
        for index in range(shown.stream.layers):
            with shown.stream.layer(index) as layer:
                see(layer)
            check_numbers(hidden, index)
            task.advance()


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    one, other = one.float(), other.float()
    # their lengths first: the square of a massive activation overflows sooner than the activation
    return (nn.functional.normalize(one, dim=-1) * nn.functional.normalize(other, dim=-1)).sum(-1)


def _spans(layers: list[int]) -> str:
    """`3, 21-24` for [3, 21, 22, 23, 24]."""
    spans: list[list[int]] = []
    for index in layers:
        if spans and spans[-1][-1] == index - 1:
            spans[-1][1:] = [index]
        else:
            spans.append([index])
    return ", ".join("-".join(map(str, span)) for span in spans)


# (windows, how many layers go, how many of the first stay, progress) -> layers that stay, scores
METHODS: Mapping[str, Callable[[Shown, int, int, Progress], tuple[list[int], list[float]]]] = {
    "angular": _angular,
    "influence": _influence,
    "loss": _loss,
}
