"""What a running step has finished, kept on disk so that a killed run goes on where it stood.

One safetensors file beside the step's partial folder: the step's own state as JSON and tensors. It is replaced in one
rename, after the weights it speaks of were synced, and it is read only by a run whose step has the same key.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.disk import disk_errors, sync

if TYPE_CHECKING:
    import torch

EVERY = 60.0  # seconds of work after which a state is worth writing


@dataclass(frozen=True)
class State:
    """`facts`: JSON data; `tensors`: exact, in the dtypes they were saved in."""

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Ledger:
    """`load()` what an earlier run of the same step left; `save(...)` when `due()`.

    The key is asked for when it is first needed: it may have to wait for digests.
    """

    def __init__(self, file: Path, key: Callable[[], str], every: float = EVERY) -> None:
        self.file, self.every, self._key = file, every, key
        self._last = time.monotonic()

    @cached_property
    def key(self) -> str:
        """What a state must have been made from, to be of use."""
        return self._key()

    def load(self) -> State | None:
        """The state last saved under this key; None where there is none, or it cannot be read."""
        from safetensors import SafetensorError, safe_open

        if not self.holds():
            return None
        try:
            with safe_open(self.file, framework="pt") as stored:
                # cloned, to lie where torch aligns memory: MKL rounds products of what lies elsewhere in another way
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
                return State(json.loads(stored.metadata()["facts"]), tensors)
        except (SafetensorError, ValueError, KeyError, OSError):
            return None  # damaged: the step starts over, which is right in any case

    def holds(self) -> bool:
        """Whether a state saved under this key is there."""
        from safetensors import SafetensorError, safe_open

        if not self.file.is_file():
            return False
        try:
            with safe_open(self.file, framework="pt") as stored:
                return (stored.metadata() or {}).get("key") == self.key
        except (SafetensorError, OSError):
            return False

    def due(self) -> bool:
        """Whether enough work was done since the last save."""
        return time.monotonic() - self._last >= self.every

    def saved(self) -> None:
        """A state was written just now."""
        self._last = time.monotonic()

    def save(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep `facts` and `tensors`; the weights they speak of must be on the disk (`Writer.sync`)."""
        from safetensors.torch import save_file

        partial = self.file.with_name(self.file.name + ".partial")
        with disk_errors(partial):
            metadata = {"key": self.key, "facts": json.dumps(facts)}
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=metadata)
            sync(partial)
            os.replace(partial, self.file)
            sync(self.file.parent)
        self.saved()

    def forget(self) -> None:
        """The step is finished."""
        self.file.unlink(missing_ok=True)
        shutil.rmtree(self.training, ignore_errors=True)

    @property
    def training(self) -> Path:
        """A folder beside the state, for a step whose library writes files of its own."""
        return self.file.with_suffix(".training")
