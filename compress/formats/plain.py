"""Plain floating-point checkpoints: as they are, or every float tensor cast to bf16 or fp16.

An fp16 cast that would overflow is refused with the tensor's name; the dtype that config.json names follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import Header, TensorSpec
from compress.formats.format import FLOATS, Format, decoder_linears, narrow

if TYPE_CHECKING:
    import torch

CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16"}
NESTED = ("text_config", "vision_config")


@dataclass(frozen=True)
class Plain(Format):
    """`dtype`: the safetensors dtype that all floats get; None leaves every tensor as it is."""

    dtype: str | None = None

    def stored(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        return (self.kept(weight),)

    def kept(self, tensor: TensorSpec) -> TensorSpec:
        return tensor if self.dtype is None or tensor.dtype not in FLOATS else replace(tensor, dtype=self.dtype)

    def linears(self, header: Header) -> tuple[str, ...]:
        from compress.arch import family_of

        return decoder_linears(header, family_of(header))

    def config(self, header: Header, linears: Sequence[str]) -> dict[str, Any]:
        del linears
        config = dict(header.config)
        if self.dtype is None:
            return config
        name = CONFIG_NAMES[self.dtype]
        for key in NESTED:
            if isinstance(config.get(key), Mapping):
                inner = config[key]
                config[key] = {**inner, **{k: name for k in ("dtype", "torch_dtype") if k in inner}}
        return {**config, **({"torch_dtype": name} if "torch_dtype" in config else {}), "dtype": name}

    def pack_rows(self, module: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        name = f"{module}.weight"
        return {name: self.cast(name, rows)}

    def cast(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self.dtype is None or not value.is_floating_point():
            return value
        from compress.checkpoint.reader import TORCH_DTYPES

        return narrow(name, value, TORCH_DTYPES[self.dtype])

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return tensors[f"{module}.weight"].to(dtype)


PLAIN = Plain("plain", "what they are")
BF16 = Plain("bf16", "bfloat16, like every float tensor", dtype="BF16")
FP16 = Plain("fp16", "float16, like every float tensor", dtype="F16")
