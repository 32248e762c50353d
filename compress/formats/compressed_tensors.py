"""compressed-tensors, `pack-quantized`, 8-bit weights and float activations (W8A16): exact to decompress.

P.weight_packed int32 [out, ceil(in/4)]: four codes + 128 a word, the first in the lowest byte; P.weight_scale [out, 1]
in the weight's dtype; P.weight_shape int64 [2]. weight = code * scale. Codes are rounded to nearest against the scale
as it is stored, so its own rounding costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.arch import family_of
from compress.checkpoint.headers import Header, TensorSpec
from compress.formats.format import Format, left_plain

if TYPE_CHECKING:
    import torch

PACKED = "pack-quantized"
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


@dataclass(frozen=True)
class W8A16(Format):
    """Int8 per output row, symmetric, four codes in an int32."""

    def stored(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        module, (rows, columns) = weight.name.removesuffix(".weight"), weight.shape
        return (
            TensorSpec(f"{module}.weight_packed", "I32", (rows, -(-columns // 4))),
            TensorSpec(f"{module}.weight_scale", "F32" if weight.dtype == "F64" else weight.dtype, (rows, 1)),
            TensorSpec(f"{module}.weight_shape", "I64", (2,)),
        )

    def linears(self, header: Header) -> tuple[str, ...]:
        suffix = ".weight_packed"
        return tuple(name.removesuffix(suffix) for name in header.tensors if name.endswith(suffix))

    def config(self, header: Header, linears: Sequence[str]) -> dict[str, Any]:
        # a skipped tower becomes a regex on its last part: loaders rename what stands before it (model.visual, visual)
        towers = {name for name in family_of(header).skip if "." in name}
        names = left_plain(header, linears)
        ignore = [f"re:.*{name.rsplit('.', 1)[-1]}.*" if name in towers else name for name in names]
        group = {"targets": ["Linear"], "weights": dict(WEIGHTS), "input_activations": None, "format": PACKED}
        quantization = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": PACKED,
            "ignore": ignore,
            "config_groups": {"group_0": group},
        }
        return {**header.config, "quantization_config": quantization}

    def pack_rows(self, module: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        dtype = torch.float32 if rows.dtype == torch.float64 else rows.dtype
        wide = rows.float()
        low, high = torch.aminmax(wide, dim=1, keepdim=True)
        scale = _scale(torch.maximum(high, -low), dtype)
        codes = (wide / scale.float()).round_().clamp_(-128, 127).add_(128).to(torch.uint8)
        spare = -codes.shape[1] % 4
        packed = torch.nn.functional.pad(codes, (0, spare)).contiguous().view(torch.int32)
        return {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale}

    def constants(self, module: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        import torch

        return {f"{module}.weight_shape": torch.tensor(shape, dtype=torch.int64)}

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        import torch

        columns = int(tensors[f"{module}.weight_shape"][1])
        codes = tensors[f"{module}.weight_packed"].view(torch.uint8)[:, :columns]
        # stock transformers casts the scale to the model's dtype and multiplies there
        return codes.to(dtype).sub_(128).mul_(tensors[f"{module}.weight_scale"].to(dtype))


def _scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """max |row| / 127 [rows, 1] in `dtype`, one step up where its rounding (fp16 subnormals) would clip the largest
    value; 1 for a row of zeros."""
    import torch

    scale = (largest / 127.0).to(dtype).float()
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = torch.where(scale * 127.5 < largest, scale + step, scale)
    return torch.where(largest == 0, 1.0, scale).to(dtype)


W8A16_FORMAT = W8A16("w8a16", "int8 packed in int32 with one scale per output row (compressed-tensors pack-quantized)")
