"""Which number format the matrix products of distillation run in, and why. Torch-free.

bf16 helps where the processor multiplies it natively; elsewhere the products are emulated and slower than float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NATIVE = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Precision:
    """`autocast`: matrix products in bf16; master weights, norms, softmax and loss stay float32 either way."""

    autocast: bool
    reason: str


def cpu_precision(cpuinfo: Path = Path("/proc/cpuinfo")) -> Precision:
    """bf16 autocast if the processor's flags name a native bf16 product, else float32."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Precision(False, f"float32, because {cpuinfo} does not say what the processor can do")
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    for native in NATIVE:
        if native in flags:
            return Precision(True, f"bf16 autocast, because the processor has {native}")
    return Precision(False, f"float32, because the processor has neither {' nor '.join(NATIVE)}")
