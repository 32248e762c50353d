"""The distill step: load student and teacher with their stock classes, train, write the student's own tensors back.

Weights are trained in float32 and written in the dtypes they had on disk, under the names they had there; what is
not trained (a vision tower) keeps its bytes. With the same thread count, two runs give the same bytes.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from compress.arch import Family, family_of
from compress.checkpoint.headers import read_header
from compress.checkpoint.reader import TORCH_DTYPES, Reader
from compress.checkpoint.stock import load_stock
from compress.checkpoint.writer import Writer
from compress.data import DataSpec, Tokens, windows
from compress.device import device_of, precision_of
from compress.errors import SelfCheckError, UserError
from compress.losses import LOSSES
from compress.machine import Precision
from compress.steps.distill.options import DistillOptions
from compress.steps.distill.plan import checkpointing, teacher_dtype, trained
from compress.steps.distill.saved import last
from compress.steps.distill.trainer import Decoder, Distiller
from compress.steps.types import Job, Outcome
from compress.stream.stock import quiet

PROBE = (2, 64)  # windows x tokens of the training data whose logits the written folder must give


def run(job: Job) -> Outcome:
    """Train `job.source` to give the distribution of `job.teacher`; write it to `job.target`.

    The outcome's logits are those of the weights as written (rounded to their dtypes), computed in float32.
    Raises UserError: a tokenizer unlike the teacher's, weights that do not fit the stock class or are NaN or infinite,
    a loss that becomes NaN; SelfCheckError when something trained has no place on disk.
    """
    if job.teacher is None:
        raise UserError("distill: no teacher was given")
    options = cast(DistillOptions, job.plan.options)
    device = device_of(job.machine)
    precision = precision_of(device)
    job.progress.note(f"distill: {precision.reason}")
    tokens = windows(job.data["training"], "training", job.source, job.seed, model=job.teacher, progress=job.progress)
    compare_tokenizers(job.source, job.teacher, job.data["training"], tokens, job.seed)
    order = training_order(tokens.ids, options, job.seed)
    teacher_header = read_header(job.teacher)
    dtype = TORCH_DTYPES[teacher_dtype(teacher_header, precision)]
    with quiet():
        teacher = _loaded(job.teacher, family_of(teacher_header), dtype)
        teacher.model.to(device)
        student = _loaded(job.source, job.family, torch.float32)
    for name in (job.family.text, job.family.head):
        student.model.get_submodule(name).requires_grad_(True)
    started = time.perf_counter()
    losses = _train(job, options, precision, device, student, teacher, order)
    seconds = time.perf_counter() - started
    del teacher
    student.model.to("cpu")  # the self-check computes there
    _write(job, student.model)
    probe = torch.from_numpy(tokens.ids[: PROBE[0], : PROBE[1]])
    with torch.no_grad():
        logits = student.model(input_ids=probe, use_cache=False).logits.float()
    receipt = {
        "loss": options.loss,
        "paper": LOSSES[options.loss].paper,
        "steps": len(losses),
        "tokens": order.size,
        "data": {**tokens.record, "note": tokens.note},
        "precision": precision.reason,
        "teacher_dtype": str(dtype).removeprefix("torch."),
        "losses": [float(f"{value:.6g}") for value in losses],
    }
    measured = {"training_seconds": seconds, "seconds_per_step": seconds / len(losses)}
    return Outcome(receipt=receipt, probe=probe, logits=logits, measured=measured)


def training_order(ids: npt.NDArray[np.int64], options: DistillOptions, seed: int) -> npt.NDArray[np.int64]:
    """The windows of all steps in their order, [steps * batch, L].

    The first pass takes them as they come (they were chosen in seeded order), every later one in an order of its own.
    The last batch is filled up from the next pass, so that every step weighs the same.
    """
    steps = max(1, math.ceil(len(ids) * options.epochs / options.batch - 1e-9))
    steps = min(steps, options.max_steps or steps)
    need = steps * options.batch
    passes = [np.arange(len(ids))]
    while len(passes) * len(ids) < need:
        passes.append(np.random.Generator(np.random.PCG64([seed, len(passes)])).permutation(len(ids)))
    return ids[np.concatenate(passes)[:need]]


def compare_tokenizers(source: Path, teacher: Path, spec: DataSpec, ours: Tokens, seed: int) -> None:
    """Refuse a teacher whose tokenizer gives the training text other ids. Equal files are not tokenized twice."""
    files = [folder / "tokenizer.json" for folder in (source, teacher)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    theirs = windows(spec, "training", teacher, seed)
    if not np.array_equal(ours.ids, theirs.ids):
        raise UserError(
            f"{teacher}: the teacher's tokenizer gives other token ids than {source}'s for the training text",
            hint="name a teacher with the same vocabulary",
        )


def _loaded(folder: Path, family: Family, dtype: torch.dtype) -> Decoder:
    return Decoder(load_stock(folder, dtype), family.text, family.head)


def _train(
    job: Job,
    options: DistillOptions,
    precision: Precision,
    device: str,
    student: Decoder,
    teacher: Decoder,
    order: npt.NDArray[np.int64],
) -> list[float]:
    """Run the Trainer; one loss a step."""
    sizes = job.family.sizes(job.plan.before)
    twice = checkpointing(sizes, options.batch * order.shape[1])
    steps = len(order) // options.batch
    with _scratch(job) as scratch, job.progress.task("distilling", steps) as task, quiet():
        trainer = Distiller(
            student,
            teacher,
            order,
            LOSSES[options.loss].load(),
            options,
            seed=job.seed,
            autocast=precision.native,
            device=device,
            checkpointing=twice,
            scratch=scratch,
            progress=job.progress,
            task=task,
            ledger=job.ledger,
        )
        earlier = None if job.ledger is None else last(job.ledger)
        if earlier is None:
            trainer.train()
        else:
            folder, trainer.losses = earlier
            job.progress.note(f"going on from step {len(trainer.losses)} of {steps}, where an earlier run ended")
            task.advance(len(trainer.losses), earlier=True)
            trainer.train(resume_from_checkpoint=str(folder))
    student.model.zero_grad(set_to_none=True)
    student.model.eval()
    return trainer.losses


@contextmanager
def _scratch(job: Job) -> Iterator[Path]:
    """Where the Trainer may write: kept with the ledger, else removed."""
    if job.ledger is not None:
        job.ledger.training.mkdir(exist_ok=True)
        yield job.ledger.training
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _write(job: Job, model: nn.Module) -> None:
    """Write what was trained, rounded, and copy the rest; the model in memory is left with the rounded weights."""
    after = job.plan.after
    names = frozenset(trained(after, job.family))
    # both names of a tied matrix lead to the one parameter, so a head that is not on disk is not missed
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    of = {name: job.family.parameter(name) for name in names}  # by its name on disk
    placed = {id(parameters[name]) for name in of.values() if name in parameters}
    lost = [name for name, value in parameters.items() if value.requires_grad and id(value) not in placed]
    if lost:
        raise SelfCheckError(f"distill trained '{lost[0]}', which has no place in the checkpoint")
    with (
        Reader(job.source, job.plan.before) as reader,
        Writer(job.target, after.tensors.values(), job.shard_bytes) as writer,
    ):
        writer.carry(job.source)
        writer.config(after.config, job.source)
        with job.progress.task("writing the student", len(after.tensors)) as task:
            for name, spec in after.tensors.items():
                if name in names and of[name] in parameters:
                    writer.put(name, _rounded(name, parameters[of[name]], TORCH_DTYPES[spec.dtype]))
                else:
                    writer.copy(reader, name)
                task.advance()


def _rounded(name: str, parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    value = parameter.detach().to(dtype)
    if not bool(torch.isfinite(value).all()):
        raise UserError(
            f"distill: '{name}' left the range of {str(dtype).removeprefix('torch.')}", hint="lower learning_rate"
        )
    with torch.no_grad():
        parameter.copy_(value)
    return value
