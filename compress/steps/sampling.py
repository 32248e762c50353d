"""Text that a model samples from itself (`self`): which model writes it, and what holding it takes. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compress.arch import family_of
from compress.checkpoint.headers import Header
from compress.data import SELF, DataSpec, counts, sampling_memory, sources
from compress.errors import MachineError, UserError, size
from compress.formats import is_quantized
from compress.machine import Machine


@dataclass(frozen=True)
class Author:
    """A model that samples its own text, by its header, and what is asked of it."""

    header: Header
    spec: DataSpec

    def refuse(self) -> None:
        """UserError where the model cannot write."""
        if is_quantized(self.header):
            raise UserError(f"{SELF}: a quantized model samples no text of its own; name other text")

    def memory(self) -> int:
        """Estimated peak bytes above interpreter and libraries."""
        sizes = family_of(self.header).sizes(self.header)
        windows, length = counts(self.spec)[SELF] or 0, self.spec.length
        kv_width = sizes.kv_heads * sizes.head_dim
        return sampling_memory(self.header, sizes.layers, kv_width, sizes.vocab, windows, length)

    def check(self, machine: Machine) -> None:
        """MachineError, with the reason, where the model would have to be streamed to write."""
        needed, available = self.memory(), machine.available_memory()
        if needed > available:
            raise MachineError(
                f"{SELF}: sampling holds the whole model in memory, about {size(needed)}, and "
                f"{size(available)} are available; streamed, it would read all layers again for every token",
                hint="name other text: files, a folder, builtin or hub:",
            )


def authors_of(
    data: Mapping[str, DataSpec], needed: Iterable[str], before: Header, teacher: Header | None
) -> dict[str, Author]:
    """The parts of data that a model writes itself: calibration the recipe's model, training the teacher of distill."""
    headers = {"calibration": before, "training": teacher or before}
    return {p: Author(headers[p], data[p]) for p in needed if p in headers and SELF in sources(data[p])}
