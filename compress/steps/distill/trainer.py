"""transformers' Trainer with the teacher's distribution as the target, quiet.

Windows come in the order they are given, batches are whole, AdamW's learning rate warms up and follows a cosine.
It writes no log, and checkpoints only for a run that may be killed (saved.py); each step's loss is kept in `losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from compress.checkpoint.disk import disk_errors
from compress.checkpoint.ledger import Ledger
from compress.errors import UserError
from compress.losses import LossFunction
from compress.machine import Progress, Task
from compress.steps.distill.options import DistillOptions
from compress.steps.distill.saved import Saving

NOTES = 5  # lines with the loss in one run


@dataclass(frozen=True)
class Decoder:
    """The text model of a stock class and its output matrix: `hidden` gives [B, L, h] for ids [B, L]."""

    model: nn.Module
    text: str
    head: str

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The final norm's output; causal, positions 0 .. L-1."""
        output = self.model.get_submodule(self.text)(input_ids=ids, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @property
    def weight(self) -> torch.Tensor:
        """The output matrix [vocab, h]."""
        return self.model.get_submodule(self.head).weight  # type: ignore[return-value]


class Distiller(Trainer):
    """Trains `student` on `windows` [steps * batch, L], in their order, to give the distribution of `teacher`."""

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder,
        windows: npt.NDArray[np.int64],
        loss: LossFunction,
        options: DistillOptions,
        *,
        seed: int,
        autocast: bool,
        device: str,
        checkpointing: bool,
        scratch: Path,
        progress: Progress,
        task: Task,
        ledger: Ledger | None = None,
    ) -> None:
        steps = len(windows) // options.batch
        arguments = TrainingArguments(
            output_dir=str(scratch),
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            train_sampling_strategy="sequential",
            max_grad_norm=options.max_grad_norm,
            seed=seed,
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: the Trainer would take all it sees
        if checkpointing:
            # renamed in transformers 5; the old name warns where the new one exists
            model: Any = student.model
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        optimizer = adamw(student.model, options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps, round(options.warmup * steps)))
        super().__init__(
            model=student.model,
            args=arguments,
            train_dataset=_Windows(windows),
            optimizers=(optimizer, scheduler),
            callbacks=[_Tell(self, steps, progress, task)],
        )
        self.remove_callback(PrinterCallback)  # disable_tqdm brings it; it prints to stdout
        if ledger is not None:
            self.add_callback(Saving(self, ledger))
        self.losses: list[float] = []
        self._rate = scheduler.get_last_lr
        self._student, self._teacher, self._loss = student, teacher, loss
        self._temperature, self._autocast, self._device_type = options.temperature, autocast, torch.device(device).type

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        with disk_errors(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*arguments, **keywords)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss per token of one batch; UserError for NaN or infinity, which no later step would mend."""
        del model, return_outputs, num_items_in_batch  # one process: the model is the student's, every token counts
        ids = inputs["input_ids"]
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._autocast):
            with torch.no_grad():
                theirs = self._teacher.hidden(ids).flatten(0, 1)
            ours = self._student.hidden(ids).flatten(0, 1)
        value = self._loss(
            ours,
            self._student.weight,
            theirs,
            self._teacher.weight,
            temperature=self._temperature,
            compute=torch.bfloat16 if self._autocast else None,
        )
        if not torch.isfinite(value):
            where = f"step {len(self.losses) + 1} (learning rate {self._rate()[0]:.3g})"
            raise UserError(
                f"distill: the loss is {value.item()} at {where}",
                hint="lower learning_rate or max_grad_norm",
            )
        self.losses.append(value.item())
        return value


class _Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, ids: npt.NDArray[np.int64]) -> None:
        self._ids = torch.from_numpy(np.ascontiguousarray(ids))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index]}


class _Tell(TrainerCallback):
    """Moves the bar at every step; says the loss a few times."""

    def __init__(self, trainer: Distiller, steps: int, progress: Progress, task: Task) -> None:
        self._trainer, self._steps, self._progress, self._task = trainer, steps, progress, task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control, kwargs
        step = int(state.global_step)
        self._task.advance()
        if step == 1 or step == self._steps or step % max(1, self._steps // (NOTES - 1)) == 0:
            self._progress.note(f"distill step {step} of {self._steps}: loss {self._trainer.losses[-1]:.4f}")


def adamw(model: nn.Module, options: DistillOptions) -> torch.optim.AdamW:
    """AdamW over what is trained; weight decay on matrices only (Loshchilov, Hutter 2019, arXiv:1711.05101)."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def schedule(steps: int, warmup: int) -> Callable[[int], float]:
    """Factor of the learning rate at step 0 .. steps-1: linear up over `warmup` steps, then a cosine towards zero.

    No step has a factor of zero, as the first and the last would in the common version: a demo has few of them.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor
