"""The prune step: one decoder layer at a time is measured, ranked, cut, refitted, written, and fed onwards.

Statistics come from behind the layers already pruned (sequential), so each refit sees what its layer will really get;
but the FFN's come from behind its own layer's whole attention.
A quantize step that follows can be done in the same pass: layers are then written in its format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from compress.arch import Group, family_of
from compress.arch.kv import KV_HEADS, kv_heads
from compress.arch.rope import arranged, row_orders
from compress.checkpoint.per_layer import one_or_each
from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.criteria import CRITERIA, GroupView, Ranking, ranking_of
from compress.data import windows
from compress.device import device_of
from compress.errors import UserError
from compress.formats import PLAIN, decoder_linears, format_named, open_stream
from compress.formats.packing import Packer
from compress.solve import HeldOut, best_damping, cut_error, damping_vector, refit
from compress.steps.prune import gradients, scores
from compress.steps.prune.after import loading
from compress.steps.prune.decoder import layers_of
from compress.steps.prune.depth import Depth, check_places, find_depth, settled
from compress.steps.prune.enough import check_held_out
from compress.steps.prune.gathered import gathered, groups_cut, needs, widest
from compress.steps.prune.inputs import FFN, look
from compress.steps.prune.joint import gated, joint_refit, written
from compress.steps.prune.kv import Merger
from compress.steps.prune.measured import receipt as receipt_of
from compress.steps.prune.options import DROP, PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.steps.prune.propagation import Dense
from compress.steps.prune.scores import Chosen, Errors
from compress.steps.prune.surgery import check_range, columns, cut, select, view
from compress.steps.prune.vision import CutTower, cut_tower
from compress.steps.prune.weights import TokenWeights, check_tokens
from compress.steps.types import Job, Outcome
from compress.stream.backward import Found
from compress.stream.fed import Fed
from compress.stream.forward import Stream, check_numbers, compute_dtype
from compress.stream.vision import Sight, show, sight_of, token_positions

PROBE = (2, 64)  # windows x tokens whose logits the self-check compares


def run(job: Job) -> Outcome:
    """Prune `job.source` into `job.target`, in the format of `job.pack` if a quantize step is done with it."""
    plan, data = cast(PrunePlan, job.plan), job.data["calibration"]
    options = cast(PruneOptions, plan.options)
    asked = options.token_shares is not None
    tokens = windows(data, "calibration", job.source, job.seed, kinds=asked, images=True, progress=job.progress)
    job.progress.note(tokens.note)
    weights = TokenWeights(options, tokens.kinds)
    ids = torch.from_numpy(tokens.ids)
    check_held_out(options, len(ids))
    if columns := widest(plan, job.family):
        said = check_tokens(tokens, data.samples is not None, columns, options)
        if said is not None:
            job.progress.note(said)
    sight, tensors = sight_of(tokens), (job.pack or job.plan).after.tensors.values()
    tower = cut_tower(job, sight)
    with (
        tower.reader() as reader,
        tower.reader(device_of(job.machine)) as streamed,
        Writer(job.target, tensors, job.shard_bytes, keep=job.ledger is not None) as writer,
    ):
        depth = find_depth(job, streamed, ids, sight, tower.kept())
        check_places(job, streamed, depth)
        job = settled(job, depth)
        plan = cast(PrunePlan, job.plan)
        pruner = _Pruner(job, plan, options, depth, weights, sight, tower, reader, streamed, writer)
        job.progress.note(f"layers run in {pruner.why}")
        probe_ids = ids[: PROBE[0], : PROBE[1]]
        logits = pruner.run(ids, probe_ids)
        writer.config((job.pack or plan).after.config, job.source)
        writer.carry(job.source)
        document = scores.document(job, plan, options, pruner.chosen, tokens.digest, depth) | tower.document()
        importance = _saved({**scores.tensors(pruner.chosen), **tower.scores()})
        folder = f"sensitivity/{job.name or job.target.name}"
        writer.file(f"{folder}/importance.safetensors", importance)
        writer.text(f"{folder}/importance.json", json.dumps(document, indent=1) + "\n")
    receipt = {
        "keep": {name: one_or_each([keep[name] for keep in plan.keep]) for name in plan.keep[0]},
        **({} if depth is None else {"layers": depth.document()}),
        **tower.document(),
        "removed": plan.removed,
        **loading(plan.after),
        **(receipt_of(plan.measured, plan.predicted_loss or 0.0) if plan.measured is not None else {}),
        "precision": pruner.why,
        "calibration": {**tokens.record, "tokens": int(ids.numel())},
        "importance_sha256": hashlib.sha256(importance).hexdigest(),
        "relative_output_error": scores.errors(pruner.chosen),
        **({} if pruner.merger is None else {"kv_merge": {"method": options.kv_merge, "errors": pruner.merged}}),
    }
    packed: tuple[dict[str, Any], ...] = ()
    if job.pack is not None:
        sizes = {"bytes_before": plan.nbytes, "bytes_after": job.pack.nbytes}
        packed = (pruner.packer.receipt() | sizes,)
    return Outcome(receipt=receipt, probe=probe_ids, logits=logits, packed=packed)


class _Pruner:
    """The pass over the layers; holds the streams before and after the cut, and what was chosen so far.

    `streamed` reads where layers run: statistics, ranking and refit are done there. The probe and what is written are
    in the machine's own memory, as `reader` has them.
    """

    def __init__(
        self,
        job: Job,
        plan: PrunePlan,
        options: PruneOptions,
        depth: Depth | None,
        weights: TokenWeights,
        sight: Sight,
        tower: CutTower,
        reader: Reader,
        streamed: Reader,
        writer: Writer,
    ) -> None:
        self.job, self.plan, self.options, self.depth = job, plan, options, depth
        self.weights, self.sight, self.tower = weights, sight, tower
        self.reader, self.streamed, self.writer = reader, streamed, writer
        self.criterion = CRITERIA[plan.criterion]
        family, made = job.family, family_of(plan.after)
        dtype, self.why = compute_dtype(plan.before.dtype, streamed.device)
        self.before = Stream(streamed, family, dtype=dtype)
        self.after = Stream(streamed, made, dtype=dtype, config=plan.after.config)
        after = plan.after
        self.packer = Packer(writer, PLAIN, ())
        if job.pack is not None:
            after, how = job.pack.after, format_named(cast(Any, job.pack.options).format)
            self.packer = Packer(writer, how, decoder_linears(plan.after, made), job.machine.threads)
        # the probe runs in float32 whatever the statistics run in: the self-check compares it exactly
        self.probe = open_stream(self.packer.written(reader, after), torch.float32)
        # units are chosen and cut in the order that the source has; what is left goes into the order of its new family
        text = plan.after.text_config
        self.orders = [row_orders(sizes, text, family.rope, made.rope) for sizes in made.layers(plan.after)]
        layers = layers_of(plan.before, family)
        self.groups = groups_cut(plan, family)
        self.names = tuple(layers[0].shapes)
        self.needs = needs(plan)
        self.wanted = gathered(plan, self.groups)
        self.gradients: Found = []  # of the layers to come
        self.positions: torch.Tensor | None = None  # of all tokens, where images stand between them
        self.dense: Dense | None = None  # where errors propagate
        self.chosen: list[dict[str, Chosen]] = []
        heads = layers[0].sizes.kv_heads
        self.kv = kv_heads(layers[0].sizes, self.names)
        self.kv_left = plan.keep[0].get(KV_HEADS, heads)
        dropped = heads - self.kv_left if options.kv_merge == DROP else 0
        self.dropping = {"heads": dropped} if dropped else {}  # group -> balance blocks that go as a whole
        self.merger = None if dropped or self.kv_left == heads else self._merger()
        self.merged: dict[str, dict[str, float]] = {}  # the errors of merging, by layer of the source

    def _merger(self) -> Merger:
        damping = self.options.damping if self.options.refit else None
        method = self.options.kv_merge
        return Merger(self.job.family, self.plan.before, self.kv_left, method, damping, self.before, self.after)

    def run(self, ids: torch.Tensor, probe_ids: torch.Tensor) -> torch.Tensor:
        """All layers, and what lies outside them; returns the probe's logits [B, L, vocab]."""
        self.positions = token_positions(self.before, ids, self.sight.images)
        hidden, probe = self._begin(ids, probe_ids)
        layers = self._layers()
        with self.job.progress.task("pruning layers", len(layers)) as task:
            earlier = sum(source < len(self.chosen) for source in layers)
            task.advance(earlier, earlier=True)
            for index, source in enumerate(layers[earlier:], earlier):
                self.chosen += [{} for _ in range(len(self.chosen), source)]  # layers that go
                self._finish(index, self._layer(source, index, hidden), hidden, probe)
                task.advance()
        self.chosen += [{} for _ in range(len(self.chosen), self.before.layers)]
        done = {self.job.family.prefix(index) + name for index in range(len(layers)) for name in self.names}
        for name in self.plan.after.tensors:
            if name not in done:
                self.packer.take(self.reader, name, hold=False)
        logits = self.probe.head_logits(self.probe.norm(probe))
        if not bool(torch.isfinite(logits).all()):
            raise UserError("what is left of the model gives logits that are NaN or infinite: they overflow")
        return logits

    def _layers(self) -> Sequence[int]:
        """The layers of the source that stay."""
        return range(self.before.layers) if self.depth is None else self.depth.kept

    def _finish(
        self, index: int, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor | None, probe: torch.Tensor
    ) -> None:
        """Write layer `index` of the result, and pass on through it what goes into the next one."""
        for name, value in tensors.items():
            check_range(self.job.family.prefix(index) + name, value)
            self.packer.put(self.job.family.prefix(index) + name, value.cpu())
        if hidden is not None and index + 1 < self.plan.layers:
            with self.after.layer_from(index, tensors) as layer:
                self.after.advance(layer, hidden, positions=self.positions)
            check_numbers(hidden, self._layers()[index])
        with self.probe.layer(index) as layer:
            self.probe.advance(layer, probe)
        check_numbers(probe, self._layers()[index])
        self.packer.release()
        self._save(hidden, probe)

    def _begin(self, ids: torch.Tensor, probe_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Hidden states [N, L, hidden] of the calibration (None when nothing is gathered) and of the probe, before the
        first layer that is not done: those an earlier run has left, else the embeddings."""
        state = None if self.job.ledger is None else self.job.ledger.load()
        if self.job.ledger is None or state is None or "errors" not in state.facts:
            return self._first(ids, probe_ids)
        if not self.writer.kept:  # what the state speaks of was taken away; a later run must not believe it either
            self.job.ledger.forget()
            return self._first(ids, probe_ids)
        facts, tensors = state.facts, state.tensors
        self.gradients = gradients.restored(tensors, self.before.layers)
        self.chosen, self.merged = scores.restored(tensors, facts["errors"]), facts["merged"]
        self.writer.resume(facts["written"])
        self.packer.restore(facts["packed"])
        done = f"{len(self.chosen)} layers" if self.chosen else "what the criterion takes of the dense model"
        self.job.progress.note(f"going on after {done}, where an earlier run ended")
        if "dense" in tensors:
            self.dense = Dense(self.before, tensors["dense"], self.positions, len(self.chosen))
        return tensors.get("hidden"), tensors["probe"]

    def _first(self, ids: torch.Tensor, probe_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What `_begin` gives a run that starts, after the backward pass of the criterion, if it needs one."""
        place = {source: index for index, source in enumerate(self._layers())}
        groups = [self.groups[place[source]] if source in place else [] for source in range(self.before.layers)]
        self.gradients = gradients.gathered(self.job, self.options, self.before, ids, groups, self.needs, self.sight)
        looks = self.wanted or (self.merger is not None and self.merger.looks)
        hidden, probe = (self.before.embed(ids) if looks else None), self.probe.embed(probe_ids)
        if hidden is not None:
            show(self.before, hidden, ids, self.sight.images, self.job.progress)
            if self.options.error_propagation:
                self.dense = Dense(self.before, hidden.clone(), self.positions, 0)
        if any(self.gradients):
            self._save(hidden, probe)
        return hidden, probe

    def _save(self, hidden: torch.Tensor | None, probe: torch.Tensor) -> None:
        """Leave a state for a later run, if it is time."""
        if self.job.ledger is None or not self.job.ledger.due():
            return
        self.writer.sync()
        tensors = {**scores.tensors(self.chosen), **gradients.tensors(self.gradients), "probe": probe}
        tensors |= self.tower.kept().tensors
        if hidden is not None:
            tensors["hidden"] = hidden
        if self.dense is not None:
            tensors["dense"] = self.dense.hidden
        written = sorted(self.writer.written)
        facts = {"errors": scores.errors(self.chosen), "written": written, "packed": self.packer.state()}
        facts |= {"depth": None if self.depth is None else self.depth.document(), "merged": self.merged}
        facts |= self.tower.kept().facts
        self.job.ledger.save(facts, tensors)

    def _layer(self, index: int, place: int, hidden: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Rank, choose, cut and refit every group of layer `index`, which becomes layer `place`, and merge its KV
        heads; returns its tensors, by their names inside it."""
        original = {name: self.streamed.tensor(self.job.family.prefix(index) + name) for name in self.names}
        tensors, groups = original, self.groups[place]
        fed = None if hidden is None else Fed(hidden, self.weights.of(hidden), self.positions)
        dense = None if self.dense is None else self.dense.behind(index)
        read = look(self.before, index, groups, tensors, fed, self.wanted, self.options, dense)
        picked: dict[str, Chosen] = {}
        for group in groups:
            what = f"layer {index} {group.name}"
            statistics = read.statistics.pop(group.name, {})
            for kind, value in self.gradients[index].pop(group.name, {}).items():
                statistics[kind] = value.to(self.streamed.device)
            hessian = statistics.get("gram")
            if hessian is not None and not bool(hessian.any()):
                self.job.progress.note(f"{what}: its inputs are all zero on the calibration text: nothing to refit by")
            seen = view(tensors, group, statistics, what, (self.job.seed, index, *group.name.encode()))
            ranking = self._ranking(index, group, seen)
            keep = select(ranking, group, self.plan.keep[place][group.name], self.dropping.get(group.name, 0))
            if group.name in self.dropping:
                tensors = cut(tensors, self.kv, torch.unique(keep // group.balance))
            kept_columns = columns(keep, group.width)
            reader = f"{group.reader}.weight"
            tensors = cut(tensors, group, keep)
            error = before = alone = None
            damping = held_out = None
            if group.name == "heads" and self.merger is not None:
                pass  # o_proj is refitted when the KV heads are merged
            elif hessian is not None and self.options.refit:
                damping, held_out = self._damping(seen, kept_columns, read.held.pop(group.name, None))
                shift = read.shift if group.name == FFN else None
                result = refit(seen.reader, hessian, kept_columns, damping_vector(hessian, damping), what, shift)
                tensors[reader] = result.weight.to(tensors[reader].dtype)
                error, before = result.error, result.error_before
                if read.ffn is not None and read.act is not None and group.name == FFN:
                    ffn = replace(gated(tensors, group, len(keep)), down=result.weight)
                    inner, steps = hessian[keep][:, keep], self.options.joint_refit
                    joint = joint_refit(ffn, read.act, read.ffn, inner, damping, steps, self.streamed.device, what)
                    tensors, alone, error = written(tensors, group, joint.ffn), joint.error_before, joint.error
            elif hessian is not None:
                error = before = cut_error(seen.reader, hessian, kept_columns)
            ranked = Ranking(ranking.order.cpu(), ranking.cost.cpu())
            picked[group.name] = Chosen(ranked, keep.cpu(), Errors(error, before, held_out, damping, alone))
        self.chosen.append(picked)
        if self.merger is not None:
            stay = picked["heads"].keep if "heads" in picked else None
            tensors, errors = self.merger.merge((index, place), original, tensors, stay, fed, self.orders[place])
            self.merged |= {} if errors is None else {str(index): errors}
        return {name: arranged(name, value, self.orders[place]) for name, value in tensors.items()}

    def _ranking(self, index: int, group: Group, seen: GroupView) -> Ranking:
        """By the criterion, or as a sensitivity folder has it."""
        curves = self.plan.measured
        if curves is None:
            return ranking_of(self.criterion, seen, self.options.damping)
        order, cost = curves.order[index, group.name], curves.cost[index, group.name]
        return Ranking(*(torch.from_numpy(array).to(seen.reader.device) for array in (order, cost)))

    def _damping(self, seen: GroupView, kept: torch.Tensor, held: HeldOut | None) -> tuple[float, float | None]:
        """The damping of one refit, and its error on the held-out windows where there are any."""
        if held is None:
            return self.options.damping, None
        return best_damping(seen.reader, seen.statistics["gram"], kept, held, seen.name)


def _saved(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(dict(tensors), metadata={"format": "pt"})
