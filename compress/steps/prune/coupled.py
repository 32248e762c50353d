"""Criteria that look at the whole stock model in memory: Torch-Pruning's, on the groups that its own graph finds.

The model is loaded in float32 and traced, every group is scored, and it is let go before layers stream. What the graph
couples must be what the family's description cuts: anything else ends the run before a layer is pruned.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import nn

from compress.arch import Family, Group
from compress.checkpoint.stock import load_stock
from compress.errors import UserError
from compress.machine import Progress, return_freed_memory
from compress.steps.types import Job
from compress.stream import WHOLE, Statistic
from compress.stream.backward import Found
from compress.stream.forward import check_numbers
from compress.stream.stock import quiet

TRACED = 16  # tokens of the input with which the graph is traced
ROUNDS = 16  # times that a group may come to the same operation; in those that end it comes there twice


def scored(job: Job, ids: torch.Tensor, groups: Sequence[Sequence[Group]], needs: frozenset[Statistic]) -> Found:
    """What of `needs` takes the whole model, for every layer and group: [units], float32 in the machine's memory.

    `ids` [N, L]: windows, all of which give gradients where they are asked for. Raises UserError where Torch-Pruning
    couples other weights than the family's groups do.
    """
    found: Found = [{} for _ in groups]
    for kind in sorted(needs & WHOLE):
        importance = import_module(f"compress.criteria.{kind}").importance
        with quiet():
            model = load_stock(job.source, torch.float32)
            for module in model.modules():  # layers that differ have a config each
                if hasattr(module, "config"):
                    module.config._attn_implementation = "eager"  # its graph fails under sdpa
        if kind == "tp_taylor":
            _backward(model, {i: _prefix(job.family, i) for i, own in enumerate(groups) if own}, ids, job.progress)
        graph = _Graph(model, ids[:1, :TRACED])
        for index, own in enumerate(groups):
            for group in own:
                score = _score(model, graph, job.family, index, group, importance)
                found[index].setdefault(group.name, {})[kind] = score
        del model, graph
        return_freed_memory()
    return found


def _backward(model: nn.Module, prefixes: Mapping[int, str], ids: torch.Tensor, progress: Progress) -> None:
    """Gradients of the weights of some layers: of the windows' mean losses, summed, one window at a time."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes.values())))
    for index, prefix in prefixes.items():
        model.get_submodule(prefix.rstrip(".")).register_forward_hook(_checking(index))
    with progress.task("gradients", len(ids)) as task:
        for window in ids.split(1):
            with torch.enable_grad():
                logits = model(input_ids=window, use_cache=False).logits[0, :-1]
                nn.functional.cross_entropy(logits, window[0, 1:]).backward()
            task.advance()


def _checking(layer: int) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that refuses what decoder layer `layer` gives, where it is no number."""

    def check(module: nn.Module, args: Any, out: Any) -> None:
        del module, args
        check_numbers(out if isinstance(out, torch.Tensor) else out[0], layer)

    return check


class _Graph:
    """Torch-Pruning's dependency graph of the model, of which groups end."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        import torch_pruning

        for config in (model.config, model.config.get_text_config()):
            config.use_cache = False  # a cache among the outputs cannot be traced
        model.requires_grad_(True)  # it follows what autograd recorded
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unwrapped parameters")  # norms, of sizes that stay
            self._graph = torch_pruning.DependencyGraph().build_dependency(
                model, example_inputs={"input_ids": ids}, output_transform=lambda output: output.logits
            )
        self._passed: Counter[int] = Counter()
        for node in self._graph.module2node.values():
            for dependency in node.dependencies:
                dependency.is_triggered_by = self._counted(dependency.is_triggered_by)

    def group(self, reader: nn.Module, columns: list[int]) -> Any:
        """What is coupled to the columns of `reader`; None where Torch-Pruning would go round for ever: where two query
        heads share a KV head it takes the rotary halves for ever larger indices (version 1.6.1)."""
        import torch_pruning

        self._passed.clear()
        with suppress(_Endless):
            return self._graph.get_pruning_group(reader, torch_pruning.prune_linear_in_channels, idxs=columns)
        return None

    def _counted(self, asked: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def again(handler: Any) -> bool:
            self._passed[id(asked)] += 1
            if self._passed[id(asked)] > ROUNDS:
                raise _Endless
            return asked(handler)

        return again


class _Endless(Exception):
    """A group passes the same operation again and again."""


def _score(
    model: nn.Module,
    graph: _Graph,
    family: Family,
    layer: int,
    group: Group,
    normalized_by: Callable[[str | None], Any],
) -> torch.Tensor:
    """The mean importance of every unit's columns [units], once the graph couples to them what the family cuts."""
    reader = model.get_submodule(_prefix(family, layer) + group.reader)
    columns = list(range(group.units * group.width))
    coupled = graph.group(reader, columns)
    if coupled is None:
        raise UserError(
            f"layer {layer} {group.name}: Torch-Pruning finds no end in the graph of this {family.name}: another "
            "criterion is needed"
        )
    names = {module: name for name, module in model.named_modules()}
    seen = set(_roots(coupled, names))
    expected = {
        (_prefix(family, layer) + cut.tensor.rpartition(".")[0], cut.axis, cut.offset + column, column)
        for cut in group.cuts
        if cut.tensor.endswith(".weight")
        for column in columns
    }
    if seen != expected:
        raise UserError(
            f"layer {layer} {group.name}: Torch-Pruning couples other weights than a {family.name} has in this group: "
            "another criterion is needed"
        )
    found: torch.Tensor = normalized_by("mean")(coupled)
    if not bool(torch.isfinite(found).all()):  # it divides by the mean of all units
        plain = normalized_by(None)(coupled)
        found = found if bool(plain.any()) else plain
    return found.detach().view(group.units, group.width).mean(1).float().cpu()


def _prefix(family: Family, layer: int) -> str:
    """The path of a decoder layer in the stock model, with the dot."""
    return f"{family.text}.{family.parts.layers}.{layer}."


def _roots(coupled: Any, names: Mapping[nn.Module, str]) -> Iterator[tuple[str, int, int, int]]:
    """(Linear, axis, row or column of it, column of the reader that it goes with), of all that counts: what has no
    place of its own for every column (k and v, which heads share) does not."""
    import torch_pruning

    axes = {torch_pruning.prune_linear_out_channels: 0, torch_pruning.prune_linear_in_channels: 1}
    for position, (dependency, places) in enumerate(coupled):
        module, roots = dependency.target.module, coupled[position].root_idxs
        if isinstance(module, nn.Linear) and None not in roots:
            axis = axes[dependency.handler]
            yield from ((names[module], axis, place, root) for place, root in zip(places, roots, strict=True))
