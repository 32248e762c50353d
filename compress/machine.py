"""What the machine brings (never part of a recipe), and how progress is told.

Everything below `run` takes a `Machine` and a `Progress`; neither changes a byte of the result except through the
thread count and the device, which the receipt records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Machine:
    """`threads`: torch's intra-op threads. `memory`: bytes a run may use, None = what the machine has free. `device`:
    cpu, cuda, or auto for cuda where there is one (device.py)."""

    threads: int
    memory: int | None = None
    device: str = "cpu"

    @staticmethod
    def detect(threads: int | None = None, memory: int | None = None, device: str = "auto") -> Machine:
        """What is given; else the threads that OMP_NUM_THREADS allows, as everywhere around torch, or all cores."""
        allowed = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        limit = int(allowed) if allowed.isdecimal() else 0
        return Machine(threads=threads or limit or cores(), memory=memory, device=device)

    def available_memory(self) -> int:
        """Bytes this run may use: the limit given, else what the kernel says is available."""
        if self.memory is not None:
            return self.memory
        import psutil

        return int(psutil.virtual_memory().available)


def cores() -> int:
    """Cores that this process may use; where the system does not say (macOS), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """While open, torch uses so many threads, at least one.

    Its threads wait for each other at every operation. Beside a thread that hashes or writes, each of them must find a
    core of its own: with one thread too many, a product of 0.6 s took 9 s.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Task(Protocol):
    """`earlier`: what another run did before, and says nothing about the pace of this one."""

    def advance(self, by: int = 1, earlier: bool = False) -> None: ...


class Progress(Protocol):
    """`with progress.task("pruning layers", total=30) as task: ... task.advance()`; `note` is a line worth reading."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]: ...

    def note(self, line: str) -> None: ...


class _SilentTask:
    def advance(self, by: int = 1, earlier: bool = False) -> None:
        del by, earlier


class Silent:
    """A Progress that says nothing: for the API, and for tests."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]:
        del label, total
        return nullcontext(_SilentTask())

    def note(self, line: str) -> None:
        del line


# bfloat16 helps where the processor multiplies it natively; elsewhere it is emulated and slower than float32
NATIVE = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Precision:
    """`native`: the processor multiplies bfloat16 itself. `reason`: what the products run in, and why."""

    native: bool
    reason: str


def cpu_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> Precision:
    """Matrix products in bfloat16 if the processor's flags name a native one, else in float32."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Precision(False, f"float32, because {cpuinfo} does not say what the processor can do")
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    for native in NATIVE:
        if native in flags:
            return Precision(True, f"bfloat16, because the processor has {native}")
    return Precision(False, f"float32, because the processor has neither {' nor '.join(NATIVE)}")


def resident_memory() -> int:
    """Bytes of memory this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes this process has held, since `reset_peak_memory` where the kernel allows it (Linux)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the figure below counts from the start of the process
    import resource

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Start a new peak at the memory held now, where the kernel allows it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
            refs.write("5")
    except OSError:
        return  # the peak then counts from the start of the process: never too small


def return_freed_memory() -> None:
    """Hand freed memory back to the kernel: called after every streamed layer.

    glibc keeps what is freed, and layer-sized blocks between small ones fragment its heap: pruning 135 M parameters
    then peaks at three times what is alive. Elsewhere than glibc this does nothing.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    import ctypes

    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None  # another C library: its own policy holds
    return found


_malloc_trim = _find_malloc_trim()
