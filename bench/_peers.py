"""Other methods, on the stock model in memory, at the shapes that our plan gives: what bench/pruning.py compares with.

FLAP (An et al. 2024) and the first-order Taylor score of LLM-Pruner (Ma et al. 2023) are re-implemented from their
sources; Torch-Pruning (Fang et al. 2023) runs as its own code. Every peer ends as a stock model of the planned config
in the checkpoint's dtype, so all are judged alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.arch import Family, Group
from compress.criteria import ranking_by_score
from compress.steps.prune.plan import PrunePlan
from compress.steps.prune.surgery import columns, cut, select, view

TAYLOR_SAMPLES = 10  # LLM-Pruner's --num_examples
BATCH = 4  # windows of one forward

Scores = dict[tuple[int, str], torch.Tensor]  # (layer, group) -> [units]


@dataclass(frozen=True)
class Task:
    """What a peer gets: the dense folder, our plan (for its shapes), and the calibration windows [N, L]."""

    folder: Path
    plan: PrunePlan
    family: Family
    ids: torch.Tensor

    def dense(self, dtype: torch.dtype | None = None, attention: str = "sdpa") -> Any:
        """The stock dense model; `dtype` None: as stored."""
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=dtype or "auto", attn_implementation=attention
        ).eval()

    @property
    def groups(self) -> list[Group]:
        """The groups that lose units."""
        sizes = self.family.sizes(self.plan.before)
        groups = self.family.groups(sizes, self.plan.before.text_config)
        return [group for group in groups if self.keep[group.name] < group.units]

    @property
    def keep(self) -> Mapping[str, int]:
        """What stays in every layer: peers are compared at uniform widths."""
        return self.plan.keep[0]

    @property
    def layers(self) -> range:
        return range(self.family.sizes(self.plan.before).layers)

    def layer(self, state: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer, by their names inside it."""
        prefix = self.family.prefix(index)
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def flap(task: Task) -> Any:
    """FLAP at uniform widths (its UL-UM): variance of a column's input times its squared weight norm, squared for
    heads and summed over a head's columns. What the removed columns put out on average becomes a bias of o_proj and
    down_proj: stock llama has no such tensors, so the biases live in memory only and cannot be saved."""
    model = task.dense()
    moments = _moments(task, model)
    scores: Scores = {}
    state = model.state_dict()
    for index in task.layers:
        tensors = task.layer(state, index)
        for group in task.groups:
            reader = tensors[f"{group.reader}.weight"].double()
            _, variance = moments[index, group.name]
            metric = variance * reader.square().sum(0)
            if group.width > 1:
                metric = metric.square().view(-1, group.width).sum(1)
            scores[index, group.name] = metric
    return _cut_model(task, model, scores, {key: mean for key, (mean, _) in moments.items()})


def taylor(task: Task) -> Any:
    """LLM-Pruner's `param_first`: |weight * gradient| summed over all that a unit owns; one cut, without its LoRA."""
    model = task.dense(torch.float32)
    _backward(model, task.ids[:TAYLOR_SAMPLES])
    salience = {
        name: (parameter.detach() * parameter.grad).abs()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    scores: Scores = {}
    for index in task.layers:
        tensors = task.layer(salience, index)
        for group in task.groups:
            owned = view(tensors, group, None, group.name).owned
            scores[index, group.name] = torch.stack([part.sum(1) for part in owned]).sum(0)
    return _cut_model(task, model, scores)


def torch_pruning_magnitude(task: Task) -> Any:
    """Torch-Pruning's own pruner with its group magnitude importance, FFN only."""
    return _torch_pruning(task, "GroupMagnitudeImportance")


def torch_pruning_taylor(task: Task) -> Any:
    """Torch-Pruning's own pruner with its group Taylor importance, FFN only."""
    return _torch_pruning(task, "GroupTaylorImportance")


PEERS: dict[str, Callable[[Task], Any]] = {
    "flap-bias": flap,
    "llm-pruner": taylor,
    "torch-pruning-magnitude": torch_pruning_magnitude,
    "torch-pruning-taylor": torch_pruning_taylor,
}
FFN_ONLY = ("torch-pruning-magnitude", "torch-pruning-taylor")


def _moments(task: Task, model: Any) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance [columns] of every reader's input over the calibration tokens of the dense model."""
    sums: dict[tuple[int, str], list[torch.Tensor]] = {}

    def hook(key: tuple[int, str]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            del module
            flat = inputs[0].flatten(0, -2).double()
            total, squares = sums.setdefault(key, [torch.zeros(flat.shape[1], dtype=torch.float64) for _ in range(2)])
            total += flat.sum(0)
            squares += flat.square().sum(0)

        return add

    handles = [
        model.get_submodule(task.family.prefix(index) + group.reader).register_forward_pre_hook(
            hook((index, group.name))
        )
        for index in task.layers
        for group in task.groups
    ]
    with torch.no_grad():
        for batch in task.ids.split(BATCH):
            model.get_submodule(task.family.text)(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    tokens = task.ids.numel()
    return {
        key: (total / tokens, squares / tokens - (total / tokens).square()) for key, (total, squares) in sums.items()
    }


def _backward(model: Any, ids: torch.Tensor) -> None:
    """Gradients of the summed language-model loss over the windows, one at a time."""
    for window in ids.split(1):
        model(window, labels=window, use_cache=False).loss.backward()


def _cut_model(
    task: Task, model: Any, scores: Scores, means: Mapping[tuple[int, str], torch.Tensor] | None = None
) -> Any:
    """The stock model of the planned config that keeps the units of highest score; with `means`, the biases that
    stand for what went."""
    state = model.state_dict()
    biases: dict[str, torch.Tensor] = {}
    for index in task.layers:
        tensors = task.layer(state, index)
        for group in task.groups:
            keep = select(ranking_by_score(scores[index, group.name]), group, task.keep[group.name])
            if means is not None:
                gone = torch.ones(group.units * group.width, dtype=torch.bool)
                gone[columns(keep, group.width)] = False
                reader = tensors[f"{group.reader}.weight"].double()
                biases[task.family.prefix(index) + group.reader] = reader[:, gone] @ means[index, group.name][gone]
            tensors = cut(tensors, group, keep)
        state |= {task.family.prefix(index) + name: value for name, value in tensors.items()}
    return _stock(task, state, biases)


def _torch_pruning(task: Task, importance: str) -> Any:
    """Prune with torch_pruning.pruner.BasePruner on the stock float32 model.

    Eager attention, because its graph fails under sdpa; every dictionary is given, because its defaults are shared
    between pruners; every Linear but gate and up is ignored, so that hidden size and heads stay.
    """
    import torch_pruning

    sizes = task.family.sizes(task.plan.before)
    model = task.dense(torch.float32, attention="eager")
    model.config.use_cache = False
    ffn = {module for name, module in model.named_modules() if name.endswith((".gate_proj", ".up_proj"))}
    others = [
        module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding) and module not in ffn
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")  # norms, of the hidden size that stays
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example_inputs={"input_ids": task.ids[:1, :16]},
            importance=getattr(torch_pruning.importance, importance)(),
            # it keeps int(width * (1 - ratio)) channels: aim at the middle, or rounding loses one
            pruning_ratio=1 - (task.keep["ffn"] + 0.5) / sizes.ffn,
            ignored_layers=others,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            channel_groups={},
            output_transform=lambda output: output.logits,
        )
    if "Taylor" in importance:
        _backward(model, task.ids[:TAYLOR_SAMPLES])
    pruner.step()
    return _stock(task, model.state_dict())


def _stock(task: Task, state: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor] | None = None) -> Any:
    """A stock model of the planned config with this state, in the checkpoint's dtype; strict, so that every shape is
    the planned one."""
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[task.plan.before.dtype]
    raw = dict(task.plan.after.config)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(state)
    for name, bias in (biases or {}).items():
        model.get_submodule(name).bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return model.eval()
