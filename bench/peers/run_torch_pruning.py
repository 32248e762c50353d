"""Torch-Pruning: 20 % of the decoder's matrix parameters out of the FFN, its own pruner driven by bench/_peers.py.

In our own environment, which has it. The widths are those of our plan; calibration text is for the Taylor score.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _report import Job, Work, main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _peers import PEERS, Task
from transformers import AutoTokenizer

from compress.data import DataSpec, windows
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan

RATIO, WINDOWS, SEED = 0.20, 64, 0


def by(name: str) -> Work:
    def work(job: Job) -> None:
        data = DataSpec(source=str(job.calibration), samples=WINDOWS)
        made = make_plan(
            Recipe.single("prune", str(job.model), PruneOptions(ratio=RATIO), data=data),
            Machine.detect(),
            check_machine=False,
        )
        (step,) = made.steps
        assert isinstance(step, PrunePlan)
        ids = torch.from_numpy(windows(data, "calibration", job.model, SEED).ids)
        model = PEERS[name](Task(job.model, step, made.family, ids))
        model.save_pretrained(job.out)
        AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)

    return work


if __name__ == "__main__":
    names = ("magnitude", "taylor")
    main({name: by(f"torch-pruning-{name}") for name in names}, ("torch-pruning",))
