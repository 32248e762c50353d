"""What a format on disk is: names, planned shapes, config, and the codec both ways, in one class.

Writing and reading cannot drift apart because the same object plans, packs, unpacks and makes the module that stock
transformers would run. Torch is imported inside methods only, so planners may use everything that needs no weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.arch import Family, family_of
from compress.checkpoint.headers import Header, TensorSpec
from compress.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.checkpoint.reader import Reader

FLOATS = ("F16", "BF16", "F32", "F64")
# float32 bytes of the rows that are packed at once: few enough that every pass over them stays in a core's cache
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Format(ABC):
    """One layout on disk. `name` is what a recipe says; `about` completes "decoder linears become ...".

    `method` is the `quant_method` that config.json names ("" for plain floats), `scheme` what of it is read.
    `stock_only`: stock transformers alone loads it, so not what only vLLM loads (a Family with `stock`).
    `noisy`: the logger that tells whoever runs it the same at every product, if one does.
    """

    name: str
    about: str
    method: str = ""
    scheme: str = ""
    stock_only: bool = False
    noisy: str = ""

    # What the stored checkpoint looks like: torch-free.

    def describes(self, quantization: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` whose quant_method is `method` means this layout."""
        del quantization
        return False

    @abstractmethod
    def stored(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        """The tensors that take the place of one linear's `P.weight` [out, in]."""

    @abstractmethod
    def linears(self, header: Header) -> tuple[str, ...]:
        """Module names of the linears that `header` holds in this format."""

    @abstractmethod
    def config(self, header: Header, linears: Sequence[str]) -> dict[str, Any]:
        """The raw config.json of the output, a new dict."""

    def kept(self, tensor: TensorSpec) -> TensorSpec:
        """How a tensor that is no decoder linear lies in the output: as it is, unless the format casts everything."""
        return tensor

    def tensor_names(self, module: str) -> tuple[str, ...]:
        """Full names of the tensors that hold the weight of `module`."""
        return tuple(t.name for t in self.stored(TensorSpec(f"{module}.weight", "F32", (1, 1))))

    def module_bytes(self, weight: TensorSpec) -> int:
        """Bytes of the module of one linear in float32, beside its stored tensors."""
        return 4 * weight.parameters

    def plan(self, header: Header, linears: Sequence[str]) -> Header:
        """Header of the output when the modules `linears` of a plain checkpoint are stored in this format."""
        packed = {f"{module}.weight" for module in linears}
        tensors: list[TensorSpec] = []
        for spec in header.tensors.values():
            tensors += self.stored(spec) if spec.name in packed else (self.kept(spec),)
        return header.planned(self.config(header, linears), tensors)

    def logical(self, header: Header) -> dict[str, TensorSpec]:
        """The model's parameters behind the stored tensors: P.weight [out, in] for every packed linear.

        Shapes come from the config (a packed row does not tell its width); UserError where the stored ones contradict.
        """
        packed = {name: module for module in self.linears(header) for name in self.tensor_names(module)}
        if not packed:
            return dict(header.tensors)
        implied, dtype = family_of(header).shapes(header), header.dtype
        logical: dict[str, TensorSpec] = {}
        for name, spec in header.tensors.items():
            weight = f"{packed[name]}.weight" if name in packed else name
            if weight in logical:
                continue
            if name not in packed:
                logical[name] = spec
                continue
            if weight not in implied:
                raise UserError(f"config.json: implies no tensor '{weight}', but the checkpoint holds '{name}'")
            logical[weight] = TensorSpec(weight, dtype, implied[weight])
            for planned in self.stored(logical[weight]):
                found = header.tensors.get(planned.name)
                if found is None or found.shape != planned.shape:
                    shape = "nothing" if found is None else list(found.shape)
                    raise UserError(f"config.json: implies '{planned.name}' {list(planned.shape)}, found {shape}")
        return logical

    def parameters(self, header: Header, family: Family) -> int:
        """Parameters of the stock model, each counted once: buffers do not count, a tied lm_head not twice."""
        tied = f"{family.head}.weight" if family.sizes(header).tied else None
        tensors = self.logical(header)
        # old checkpoints stored the rotary frequencies: a buffer that stock transformers computes itself
        return sum(t.parameters for name, t in tensors.items() if name != tied and not name.endswith(".inv_freq"))

    # The codec: torch from here on.

    @abstractmethod
    def pack_rows(self, module: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Stored tensors of some rows [r, in] of P.weight, in the dtype that they have in the source: all tensors
        that grow with the rows, full names. Rows are independent, so any split gives the same bytes."""

    def constants(self, module: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Stored tensors of P that do not depend on the values; `shape` is (out, in)."""
        del module, shape
        return {}

    def cast(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The values of a tensor (or of some rows) that is no decoder linear, as the output holds them."""
        del name
        return value

    def pack(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """All stored tensors of P from its weight [out, in] in the dtype of the source; UserError names an overflow."""
        import torch

        parts = [self.pack_rows(module, weight[start:stop]) for start, stop in row_blocks(*weight.shape)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return joined | self.constants(module, (weight.shape[0], weight.shape[1]))

    @abstractmethod
    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that stock transformers uses when it loads the stored tensors in `dtype`."""

    def module(
        self, linear: nn.Linear, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> nn.Module:
        """The module that stock transformers runs for `linear` (on the meta device), filled: weight and bias.

        `tensors` holds the stored tensors of P and, when the linear has one, `P.bias`.
        """
        weight = self.unpack(module, tensors, dtype)
        fill(linear, "weight", weight)
        if linear.bias is not None:
            fill(linear, "bias", tensors[f"{module}.bias"].to(dtype))
        return linear

    # What the streaming executor calls for every linear (its `LinearLoader`).

    def load(self, reader: Reader, linear: nn.Linear, module: str, dtype: torch.dtype) -> nn.Module:
        """The module of P, read from a checkpoint stored in this format; a linear left plain is read as it is."""
        from compress.formats.plain import PLAIN

        names = self.tensor_names(module)
        stored_so = all(name in reader for name in names)
        how: Format = self if stored_so else PLAIN
        tensors = {name: reader.tensor(name) for name in how.tensor_names(module)}
        return how.module(linear, module, tensors | _bias(reader, linear, module), dtype)


def decoder_linears(header: Header, family: Family) -> tuple[str, ...]:
    """Module names of the decoder's linears in a plain checkpoint: the 2-D weights inside its layers, disk order."""
    return tuple(
        name.removesuffix(".weight")
        for name, spec in header.tensors.items()
        if name.startswith(family.inside) and name.endswith(".weight") and len(spec.shape) == 2
    )


def left_plain(header: Header, linears: Sequence[str]) -> list[str]:
    """Module names (or prefixes) that the config must tell the stock loader to leave alone, as the stock model has
    them."""
    family, packed = family_of(header), set(linears)
    left = (module for module in decoder_linears(header, family) if module not in packed)
    return [*family.skip, *map(family.parameter, left)]


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows that take at most BLOCK_BYTES in float32, one row at least."""
    step = max(1, BLOCK_BYTES // max(4 * columns, 1))
    for start in range(0, max(rows, 1), step):
        yield start, min(start + step, rows)


def fill(linear: nn.Linear, name: str, value: torch.Tensor) -> None:
    """Put `value` in the place of a meta parameter; UserError when its shape is not the one the config implies."""
    from torch import nn

    check_shape(linear, name, tuple(value.shape))
    setattr(linear, name, nn.Parameter(value, requires_grad=False))


def check_shape(linear: nn.Linear, name: str, found: tuple[int, ...]) -> None:
    """UserError when a stored weight or bias does not fit the linear that the config implies."""
    implied = tuple(getattr(linear, name).shape)
    if implied != found:
        raise UserError(f"config.json: implies a {name} of shape {list(implied)}, the checkpoint holds {list(found)}")


def narrow(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded to a narrower float dtype; UserError names a tensor that does not fit."""
    import torch

    if value.dtype == dtype:
        return value
    limit = torch.finfo(dtype).max
    largest = max(abs(float(bound)) for bound in torch.aminmax(value)) if value.numel() else 0.0
    if largest > limit:
        short = "fp16" if dtype == torch.float16 else "bf16"
        hint = "bf16 and w8a16 keep the range of a bf16 source" if short == "fp16" else None
        raise UserError(f"tensor '{name}' overflows {short} (max {largest:.6g}, {short} ends at {limit:.6g})", hint)
    return value.to(dtype)


def _bias(reader: Reader, linear: nn.Linear, module: str) -> dict[str, torch.Tensor]:
    return {} if linear.bias is None else {f"{module}.bias": reader.tensor(f"{module}.bias")}
