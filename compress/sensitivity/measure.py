"""The pass behind `autoglm-compress sensitivity`: every unit's cost, every group's cost curve, every layer's weight.

The dense model is streamed: a backward pass over some windows for the gradients at the readers' outputs, then one
forward over all of them, layer by layer. Memory: one layer, its Gram matrices, one factor of the widest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.arch import Family, Group
from compress.checkpoint.ledger import Ledger
from compress.checkpoint.reader import Reader
from compress.criteria import CRITERIA, Ranking, ranking_of
from compress.eliminate import Elimination
from compress.errors import UserError
from compress.machine import Progress
from compress.sensitivity import removal_order
from compress.solve import damping_vector
from compress.steps.prune.decoder import width_multiple
from compress.steps.prune.gradients import restored
from compress.steps.prune.gradients import tensors as saved
from compress.steps.prune.surgery import columns, view
from compress.stream import GRADIENTS, Statistic
from compress.stream.backward import BLIND, Found, gradients
from compress.stream.calls import listens
from compress.stream.fed import Fed
from compress.stream.forward import Stream, check_numbers, compute_dtype
from compress.stream.statistics import Gathered, gathering
from compress.stream.vision import Sight, show, token_positions

POINTS = 64  # of a cost curve, at most

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on besides model and text. `gradient_samples`: windows of the backward pass, the first
    of the calibration's."""

    criterion: str
    damping: float
    seed: int
    gradient_samples: int


@dataclass(frozen=True)
class Measured:
    """`tensors`: `layers.N.GROUP.KIND` as in curves.py, and `layers.N.kv.{cost,loss}`; `layers`: numbers of each layer
    and of its groups; `precision`: what the layers ran in, and why."""

    tensors: Tensors
    layers: list[dict[str, Any]]
    precision: str


def grid(group: Group, hidden: int) -> list[int]:
    """How many units have gone at the points of a group's curve, ascending from 0: what a cut of uniform widths can
    remove, at most POINTS of them. Whole removal is none of them."""
    if group.name != "ffn":
        blocks = group.units // group.balance
        return list(range(0, group.units, blocks))
    multiple = width_multiple(hidden)
    widths = range((group.units - 1) // multiple * multiple, 0, -multiple)
    stride = max(1, -(-len(widths) // (POINTS - 1)))  # an FFN of one step has no width to go to
    return [0, *(group.units - width for width in widths[::stride])]


def measure(
    reader: Reader,
    family: Family,
    ids: torch.Tensor,
    settings: Settings,
    progress: Progress,
    scratch: Path | None = None,
    sight: Sight = BLIND,
    ledger: Ledger | None = None,
) -> Measured:
    """Measure the checkpoint of `reader`, where it reads, on the windows `ids` [N, L]; `sight`: images in them.

    Predicted losses are (1/2) sum_i f_i e_i nats a token: e_i the mean square error of output i of the group's reader
    after the least-squares refit, f the diagonal of the Fisher matrix E[g g^T] of those outputs, g the gradient of the
    loss summed over tokens (the second-order term of Hassibi & Stork 1993, as Kwon et al. 2022, eq. 4 take it for
    masks; off-diagonal terms, and those between layers, are left out). `scratch`: a folder for the layers' inputs,
    where they are many. `ledger`: where an earlier run has left what it measured, and this one does. Raises UserError
    for activations that are no numbers, and as `Stream` and `gradients`.
    """
    dtype, why = compute_dtype(reader.header.dtype, reader.device)
    stream = Stream(reader, family, dtype=dtype)
    progress.note(f"layers run in {why}")
    config = reader.header.text_config
    groups = [family.groups(sizes, config) for sizes in family.layers(reader.header)]
    needs = CRITERIA[settings.criterion].needs
    done = _Done.left_in(ledger, stream.layers)
    if done is None:
        some = ids[: settings.gradient_samples]
        wanted = (needs & GRADIENTS) | frozenset[Statistic]({"output_fisher"})
        seen = sight.first(len(some))
        slopes = gradients(stream, some, groups, wanted, scratch=scratch, progress=progress, sight=seen)
        done = _Done(slopes, stream.embed(ids))
        show(stream, done.hidden, ids, sight.images, progress)
        done.save(ledger)
    else:
        after = f"{len(done.layers)} layers" if done.layers else "the backward pass"
        progress.note(f"going on after {after}, where an earlier run ended")
    fed = Fed(done.hidden, sight.weights, token_positions(stream, ids, sight.images))
    with progress.task("measuring layers", stream.layers) as task:
        task.advance(len(done.layers), earlier=True)
        for index in range(len(done.layers), stream.layers):
            measurer = _Layer(reader, stream, groups[index], index, settings)
            found = measurer.measure(fed, done.slopes[index], needs - GRADIENTS)
            done.tensors |= found.tensors
            done.layers += found.layers
            done.slopes[index] = {}
            done.save(ledger)
            task.advance()
    return Measured(done.tensors, done.layers, why)


@dataclass
class _Done:
    """What was measured so far. `slopes`: statistics of the backward pass, of the layers to come; `hidden`: what goes
    into the first of those; `tensors`, `layers`: as in `Measured`."""

    slopes: Found
    hidden: torch.Tensor
    tensors: Tensors = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def left_in(cls, ledger: Ledger | None, count: int) -> _Done | None:
        """What an earlier run of a model of `count` layers has left."""
        state = None if ledger is None else ledger.load()
        if state is None:
            return None
        tensors = {name: value for name, value in state.tensors.items() if name.startswith("layers.")}
        return cls(restored(state.tensors, count), state.tensors["hidden"], tensors, state.facts["layers"])

    def save(self, ledger: Ledger | None) -> None:
        """Leave it for a later run, if it is time."""
        if ledger is not None and ledger.due():
            ledger.save({"layers": self.layers}, {**self.tensors, **saved(self.slopes), "hidden": self.hidden})


class _Layer:
    """One decoder layer: its tensors, read once, and what is measured of them."""

    def __init__(self, reader: Reader, stream: Stream, groups: Sequence[Group], index: int, settings: Settings) -> None:
        self.reader, self.stream, self.groups, self.index, self.settings = reader, stream, groups, index, settings

    def measure(
        self,
        fed: Fed,
        slopes: Mapping[str, Mapping[Statistic, torch.Tensor]],
        needs: frozenset[Statistic],
    ) -> Measured:
        """Pass the hidden states on, in place; returns what this layer adds."""
        prefix, header = self.stream.family.prefix(self.index), self.reader.header
        names = self.stream.family.layer(self.stream.family.sizes(header), header.text_config)
        weights = {name: self.reader.tensor(prefix + name) for name in names}
        gathered = {g.name: Gathered(needs | {"gram"}, g.units, g.width, self.stream.device) for g in self.groups}
        readers = {group.reader: gathered[group.name] for group in self.groups}
        flow, told = Flow(fed.weights), fed.weights
        with (
            self.stream.layer_from(self.index, weights) as layer,
            gathering(layer, readers, told),
            flow.watching(layer),
        ):
            self.stream.advance(layer, fed.hidden, positions=fed.positions)
        check_numbers(fed.hidden, self.index)
        numbered: dict[str, dict[str, float]] = {}
        tensors: Tensors = {}
        for group in self.groups:
            statistics = gathered.pop(group.name).results()
            hessian = statistics["gram"]
            if not bool(torch.isfinite(hessian).all()):
                raise UserError(f"layer {self.index} {group.name}: activations are NaN or infinite")
            statistics |= {kind: value.to(hessian.device) for kind, value in slopes[group.name].items()}
            what = f"layer {self.index} {group.name}"
            seed = (self.settings.seed, self.index, *group.name.encode())
            seen = view(weights, group, statistics, what, seed)
            ranking = ranking_of(CRITERIA[self.settings.criterion], seen, self.settings.damping)
            arrays, numbers = self._group(group, seen.reader, hessian, ranking, statistics["output_fisher"])
            numbered[group.name] = numbers | {"energy": numbers["energy"] / max(flow.mean_square, 1e-30)}
            tensors |= {f"layers.{self.index}.{name}": value.cpu().contiguous() for name, value in arrays.items()}
        return Measured(tensors, [{"layer": self.index, **flow.numbers(), "groups": numbered}], "")

    def _group(
        self, group: Group, weight: torch.Tensor, hessian: torch.Tensor, ranking: Ranking, importance: torch.Tensor
    ) -> tuple[Tensors, dict[str, float]]:
        """The arrays of one group, by `GROUP.KIND`, and its numbers: output energy and the loss without the module."""
        order = removal_order(ranking.order.cpu().numpy(), group.balance)
        going = columns(torch.from_numpy(order).to(weight.device), group.width)
        ridge = damping_vector(hessian, self.settings.damping)
        solved = Elimination(weight, hessian, ridge, going, f"layer {self.index} {group.name}")
        removed = grid(group, weight.shape[0])
        errors = solved.leading([units * group.width for units in removed])
        energy, salience = solved.energy, importance.double()
        owned = torch.arange(group.units * group.width, device=weight.device).view(group.units, group.width)
        arrays = {
            f"{group.name}.cost": ranking.cost.float(),
            f"{group.name}.order": ranking.order.int(),
            f"{group.name}.loss": solved.alone(owned, importance) / 2,
            f"{group.name}.curve.removed": torch.tensor(removed, dtype=torch.int32),
            f"{group.name}.curve.loss": errors @ salience / 2,
            f"{group.name}.curve.error": errors.sum(1) / energy.sum().clamp_min(1e-30),
        }
        if group.name == "heads":  # those of one KV head stand in a row
            blocks = group.units // group.balance
            arrays["kv.cost"] = ranking.cost.float().view(blocks, group.balance).sum(1)
            arrays["kv.loss"] = solved.alone(owned.reshape(blocks, -1), importance) / 2
        return arrays, {"energy": float(energy.sum()), "loss_without": float(energy @ salience) / 2}


class Flow:
    """What a layer does to the residual stream: sums over the tokens of cosines, angles and squares. weights [N, L]:
    tokens of weight 0 are left out; None: none is."""

    def __init__(self, weights: torch.Tensor | None = None) -> None:
        self._weights, self._passed = weights, 0
        self._tokens, self._cosine, self._angle, self._moved, self._square = 0, 0.0, 0.0, 0.0, 0.0

    @contextmanager
    def watching(self, layer: nn.Module) -> Iterator[None]:
        """While open, inputs and outputs of `layer` are looked at."""
        handle = layer.register_forward_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
        if listens(module):
            return
        before = args[0].flatten(0, -2).float()
        after = (out if isinstance(out, torch.Tensor) else out[0]).flatten(0, -2).float()
        if self._weights is not None:
            batch = self._weights[self._passed : self._passed + len(args[0])].flatten().to(before.device) > 0
            before, after = before[batch], after[batch]
            self._passed += len(args[0])
        cosine = nn.functional.cosine_similarity(before, after, dim=-1).double().clamp(-1, 1)
        self._tokens += len(before)
        self._cosine += float(cosine.sum())
        self._angle += float(cosine.acos().sum()) / np.pi
        self._moved += float((after - before).square().sum(dtype=torch.float64))
        self._square += float(before.square().sum(dtype=torch.float64))

    @property
    def mean_square(self) -> float:
        """E ||x||^2 of the layer's inputs."""
        return self._square / max(self._tokens, 1)

    def numbers(self) -> dict[str, float]:
        """influence: 1 - E cos(input, output) (Men et al. 2024, ShortGPT, eq. 1); angular_distance: E arccos / pi
        (Gromov et al. 2024, eq. 4, over all positions); energy: ||output - input||^2 / ||input||^2."""
        return {
            "influence": 1 - self._cosine / max(self._tokens, 1),
            "angular_distance": self._angle / max(self._tokens, 1),
            "energy": self._moved / max(self._square, 1e-30),
        }
