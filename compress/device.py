"""The accelerator: whether there is one, what it multiplies natively, what it holds, and one line when it is full.

Layers stream through it one at a time: hidden states, probes and what is written stay in the machine's own memory.
Torch is imported inside functions, and on `auto` only where the system shows the driver of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import MachineError, size
from compress.machine import Machine, Precision, cpu_precision

CHOICES = ("auto", "cpu", "cuda")
WITHOUT = "--device cpu runs without it"
FIRST = "cuda:0"  # of those that are visible: CUDA_VISIBLE_DEVICES chooses
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))  # NVIDIA; the same within WSL; ROCm


def device_of(machine: Machine) -> str:
    """`cpu` or `cuda:0`, as `machine.device` asks for; MachineError for cuda where torch sees none."""
    if machine.device == "cpu" or (machine.device == "auto" and not any(map(Path.exists, DRIVERS))):
        return "cpu"
    missing = _missing()
    if missing is None:
        return FIRST
    if machine.device == "cuda":
        raise MachineError(f"--device cuda: {missing}", hint="--device cpu works everywhere")
    return "cpu"


@cache
def _missing() -> str | None:
    """Why there is no CUDA device; None if there is one. Products are then the same in every run."""
    import torch

    if torch.cuda.is_available():
        # cuBLAS gives the same bits for the same product only with workspaces of a fixed size
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__} sees no CUDA device"


def precision_of(device: str) -> Precision:
    """What matrix products of bfloat16 checkpoints run in."""
    if device == "cpu":
        return cpu_precision()
    import torch

    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision(True, f"bfloat16, because the GPU ({name}) has it")
    return Precision(False, f"float32, because the GPU ({name}) has no bfloat16")


def check_room_on(machine: Machine, needed: int) -> None:
    """MachineError when the GPU in use has fewer than `needed` bytes free."""
    if device_of(machine) == "cpu":
        return
    import torch

    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        raise MachineError(
            f"the plan needs about {size(needed)} on the GPU, {size(free)} are free",
            hint=WITHOUT,
        )


@contextmanager
def device_errors() -> Iterator[None]:
    """A full GPU becomes a MachineError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        said = " ".join(str(error).split()).split(". ")[0]
        raise MachineError(f"the GPU is full: {said}", hint=WITHOUT) from error


def reset_peak(device: str) -> None:
    """Start a new peak of the GPU's memory."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_of(device: str) -> dict[str, Any]:
    """The most bytes that tensors held on the GPU since `reset_peak`; nothing where there is none."""
    if device == "cpu":
        return {}
    import torch

    return {"device_memory_peak": torch.cuda.max_memory_allocated()}


def described(device: str) -> str:
    """`cpu`, or `cuda (NAME)`: which of several it is does not matter."""
    if device == "cpu":
        return device
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"
