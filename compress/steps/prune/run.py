"""The prune step: one decoder layer at a time is measured, ranked, cut, refitted, written, and fed onwards.

Statistics come from the layers already pruned (sequential), so each refit sees the inputs its layer will really get.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from compress.arch import Group
from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.criteria import CRITERIA, Criterion, Ranking
from compress.data import windows
from compress.solve import cut_error, damping_vector, refit
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.steps.prune.surgery import columns, cut, select, view
from compress.steps.types import Job, Outcome
from compress.stream.forward import Stream, compute_dtype
from compress.stream.statistics import Gram, gathering

PROBE = (2, 64)  # windows x tokens whose logits the self-check compares


@dataclass(frozen=True)
class Chosen:
    """What happened to one group of one layer. Errors are relative output errors on the calibration inputs, None
    when no statistics were taken."""

    ranking: Ranking
    keep: torch.Tensor
    error: float | None
    error_without_refit: float | None


def run(job: Job) -> Outcome:
    """Prune `job.source` into `job.target`."""
    plan = cast(PrunePlan, job.plan)
    options = cast(PruneOptions, plan.options)
    criterion = CRITERIA[options.criterion]
    tokens = windows(job.data["calibration"], "calibration", job.source, job.seed)
    job.progress.note(tokens.note)
    ids = torch.from_numpy(tokens.ids)
    with (
        Reader(job.source, plan.before) as reader,
        Writer(job.target, plan.after.tensors.values(), job.shard_bytes) as writer,
    ):
        pruner = _Pruner(job, plan, options, criterion, reader)
        job.progress.note(f"layers run in {pruner.why}")
        probe_ids = ids[: PROBE[0], : PROBE[1]]
        chosen, logits = pruner.run(ids, probe_ids, writer)
        for name in plan.after.tensors:
            if name not in pruner.written:
                writer.copy(reader, name)
        writer.config(plan.after.config, job.source)
        writer.carry(job.source)
        document = _document(job, plan, options, chosen, tokens.digest)
        tensors = _importance(chosen)
        scores = f"sensitivity/{job.target.name}"
        writer.file(f"{scores}/importance.safetensors", tensors)
        writer.text(f"{scores}/importance.json", json.dumps(document, indent=1) + "\n")
    receipt = {
        "keep": dict(plan.keep),
        "removed": plan.removed,
        "precision": pruner.why,
        "calibration": {"digest": tokens.digest, "tokens": int(ids.numel())},
        "importance_sha256": hashlib.sha256(tensors).hexdigest(),
        "relative_output_error": [layer["groups"] for layer in document["layers"]],
    }
    return Outcome(receipt=receipt, probe=probe_ids, logits=logits)


class _Pruner:
    """The pass over the layers; holds the streams before and after the cut."""

    def __init__(self, job: Job, plan: PrunePlan, options: PruneOptions, criterion: Criterion, reader: Reader) -> None:
        self.job, self.plan, self.options, self.criterion, self.reader = job, plan, options, criterion, reader
        self.rank = criterion.load()
        self.needs_gram = options.refit or criterion.needs_gram
        family = job.family
        dtype, self.why = compute_dtype(plan.before.dtype)
        self.before = Stream(reader, family, dtype=dtype)
        self.after = Stream(reader, family, dtype=dtype, config=plan.after.config)
        # the probe runs in float32 whatever the statistics run in: the self-check compares it exactly
        self.probe = Stream(reader, family, dtype=torch.float32, config=plan.after.config)
        sizes = family.sizes(plan.before)
        self.groups = [g for g in family.groups(sizes, plan.before.text_config) if plan.keep[g.name] < g.units]
        self.names = tuple(family.layer(sizes, plan.before.text_config))
        self.written: set[str] = set()

    def run(
        self, ids: torch.Tensor, probe_ids: torch.Tensor, writer: Writer
    ) -> tuple[list[dict[str, Chosen]], torch.Tensor]:
        """All layers; returns what was chosen in each, and the probe's logits [B, L, vocab]."""
        gather = self.needs_gram and bool(self.groups)
        hidden = self.before.embed(ids) if gather else None
        probe = self.probe.embed(probe_ids)
        chosen: list[dict[str, Chosen]] = []
        with self.job.progress.task("pruning layers", self.before.layers) as task:
            for index in range(self.before.layers):
                prefix = self.job.family.prefix(index)
                tensors = {name: self.reader.tensor(prefix + name) for name in self.names}
                grams = self._statistics(index, tensors, hidden) if hidden is not None else {}
                picked, tensors = self._layer(index, tensors, grams)
                chosen.append(picked)
                for name, value in tensors.items():
                    writer.put(prefix + name, value)
                    self.written.add(prefix + name)
                if hidden is not None and index + 1 < self.before.layers:
                    with self.after.layer_from(index, tensors) as layer:
                        self.after.advance(layer, hidden)
                with self.probe.layer_from(index, tensors) as layer:
                    self.probe.advance(layer, probe)
                task.advance()
        return chosen, self.probe.head_logits(self.probe.norm(probe))

    def _statistics(
        self, index: int, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Gram matrices of the readers' inputs, by group."""
        grams = {g.name: Gram(g.units * g.width) for g in self.groups}
        readers = {g.reader: grams[g.name] for g in self.groups}
        with self.before.layer_from(index, tensors) as layer, gathering(layer, readers):
            self.before.advance(layer, hidden, keep=False)
        return {name: gram.mean() for name, gram in grams.items()}

    def _layer(
        self, index: int, tensors: dict[str, torch.Tensor], grams: dict[str, torch.Tensor]
    ) -> tuple[dict[str, Chosen], dict[str, torch.Tensor]]:
        """Rank, choose, cut and refit every group of one layer."""
        picked: dict[str, Chosen] = {}
        for group in self.groups:
            what = f"layer {index} {group.name}"
            hessian = grams.pop(group.name, None)
            seen = view(tensors, group, hessian, what)
            ranking = self.rank(seen, self.options.damping)
            keep = select(ranking, group, self.plan.keep[group.name])
            kept_columns = columns(keep, group.width)
            reader = f"{group.reader}.weight"
            tensors = cut(tensors, group, keep)
            error = before = None
            if hessian is not None and self.options.refit:
                ridge = damping_vector(hessian, self.options.damping)
                result = refit(seen.reader, hessian, kept_columns, ridge, what)
                tensors[reader] = result.weight.to(tensors[reader].dtype)
                error, before = result.error, result.error_before
            elif hessian is not None:
                error = before = cut_error(seen.reader, hessian, kept_columns)
            picked[group.name] = Chosen(ranking, keep, error, before)
        return picked, tensors


def _importance(chosen: list[dict[str, Chosen]]) -> bytes:
    """`layers.N.GROUP.{cost,order,keep}` as safetensors."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for index, groups in enumerate(chosen):
        for name, one in groups.items():
            prefix = f"layers.{index}.{name}"
            tensors[f"{prefix}.cost"] = one.ranking.cost.to(torch.float32).contiguous()
            tensors[f"{prefix}.order"] = one.ranking.order.to(torch.int32)
            tensors[f"{prefix}.keep"] = one.keep.to(torch.int32)
    return save(tensors, metadata={"format": "pt"})


def _document(
    job: Job, plan: PrunePlan, options: PruneOptions, chosen: list[dict[str, Chosen]], digest: str
) -> dict[str, Any]:
    sizes = job.family.sizes(plan.before)
    groups: dict[str, Group] = {g.name: g for g in job.family.groups(sizes, plan.before.text_config)}
    return {
        "criterion": options.criterion,
        "paper": CRITERIA[options.criterion].paper,
        "damping": options.damping,
        "refit": options.refit,
        "calibration_sha256": digest,
        "groups": {n: {"units": g.units, "keep": plan.keep[n], "balance": g.balance} for n, g in groups.items()},
        "layers": [
            {
                "layer": index,
                "groups": {
                    name: {"error": one.error, "error_without_refit": one.error_without_refit}
                    for name, one in layer.items()
                },
            }
            for index, layer in enumerate(chosen)
        ],
    }
