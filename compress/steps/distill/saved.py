"""The Trainer's own checkpoints in the work folder: sealed when they are written, checked before they are read.

A seal names the step that wrote the checkpoint and the digest of every file in it, so a torn or foreign one is never
loaded. The Trainer reads its optimizer and random state with weights_only=True; nothing of it reaches the result.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from compress.checkpoint.digests import digest
from compress.checkpoint.disk import disk_errors, sync
from compress.checkpoint.ledger import Ledger

if TYPE_CHECKING:
    from compress.steps.distill.trainer import Distiller

SEAL = "autoglm-compress.json"


class Saving(TrainerCallback):
    """Asks for a checkpoint when enough time has passed, and seals it."""

    def __init__(self, trainer: Distiller, ledger: Ledger) -> None:
        self._trainer, self._ledger = trainer, ledger

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, kwargs
        control.should_save = self._ledger.due() and state.global_step < state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control, kwargs
        folder = self._ledger.training / f"checkpoint-{state.global_step}"
        with disk_errors(folder):
            # its arguments are a pickle that nobody reads: the step's options are in the key
            (folder / "training_args.bin").unlink(missing_ok=True)
            seal = {"key": self._ledger.key, "losses": self._trainer.losses, "files": _digests(folder)}
            partial = folder / (SEAL + ".partial")
            partial.write_text(json.dumps(seal), encoding="utf-8")
            sync(partial)
            os.replace(partial, folder / SEAL)
        for other in _checkpoints(self._ledger):
            if other != folder:
                shutil.rmtree(other)
        self._ledger.saved()


def last(ledger: Ledger) -> tuple[Path, list[float]] | None:
    """The newest whole checkpoint of this step and the losses until then; what is torn or of another step goes."""
    found = None
    for folder in _checkpoints(ledger):
        losses = _unsealed(folder, ledger.key) if found is None else None
        if losses is None:
            shutil.rmtree(folder)
        else:
            found = folder, losses
    return found


def _unsealed(folder: Path, key: str) -> list[float] | None:
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(seal, dict) or seal.get("key") != key or seal.get("files") != _digests(folder):
        return None
    return [float(value) for value in seal["losses"]]


def _checkpoints(ledger: Ledger) -> list[Path]:
    """Newest first."""
    return sorted(ledger.training.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(folder.iterdir()) if not path.name.startswith(SEAL)}
