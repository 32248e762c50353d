"""bitsandbytes LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): the codes bitsandbytes itself writes, without it.

P.weight int8 [out, in] = round(w * 127/SCB) of the weight cast to fp16 first; P.SCB float32 [out] = max |row|;
P.weight_format uint8 = 0 (row-major). Stock transformers runs it with activations rounded to int8 as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import Header, TensorSpec
from compress.formats.format import Format, check_shape, fill, left_plain, narrow

if TYPE_CHECKING:
    import torch
    from torch import nn

THRESHOLD = 6.0  # activations beyond it stay in float: bitsandbytes' and transformers' default


@dataclass(frozen=True)
class BnbInt8(Format):
    """Stored and loaded as transformers' `load_in_8bit` checkpoints are."""

    def describes(self, quantization: Mapping[str, Any]) -> bool:
        return quantization.get("load_in_8bit") is True and not quantization.get("load_in_4bit")

    def stored(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        module = weight.name.removesuffix(".weight")
        return (
            TensorSpec(f"{module}.SCB", "F32", weight.shape[:1]),
            TensorSpec(f"{module}.weight", "I8", weight.shape),
            TensorSpec(f"{module}.weight_format", "U8", ()),
        )

    def linears(self, header: Header) -> tuple[str, ...]:
        return tuple(name.removesuffix(".SCB") for name in header.tensors if name.endswith(".SCB"))

    def module_bytes(self, weight: TensorSpec) -> int:
        del weight
        return 0  # it multiplies the codes themselves

    def config(self, header: Header, linears: Sequence[str]) -> dict[str, Any]:
        quantization = {
            "quant_method": self.method,
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": THRESHOLD,
            # matched from the start of a module name, as a regex, or as a suffix: full prefixes are safe
            "llm_int8_skip_modules": left_plain(header, linears),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }
        return {**header.config, "quantization_config": quantization}

    def pack_rows(self, module: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        wide = narrow(f"{module}.weight", rows, torch.float16).float()
        scale = wide.abs().amax(dim=1)
        # the factor first, then the product in float32, as bitsandbytes does: the order decides the last bit of a code
        factor = torch.where(scale == 0, 0.0, 127.0 / scale)
        codes = wide.mul_(factor.unsqueeze(1)).round_().to(torch.int8)
        return {f"{module}.weight": codes, f"{module}.SCB": scale}

    def constants(self, module: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        import torch

        del shape
        return {f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes, scale = tensors[f"{module}.weight"], tensors[f"{module}.SCB"]
        # bitsandbytes multiplies by the reciprocal of 127 (int8_vectorwise_dequant)
        return codes.float().mul_(scale.view(-1, 1)).mul_(7.874015718698502e-3).to(dtype)

    def module(
        self, linear: nn.Linear, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> nn.Module:
        import torch
        from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

        codes = tensors[f"{module}.weight"]
        check_shape(linear, "weight", tuple(codes.shape))
        with torch.device("meta"):
            made = Linear8bitLt(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                has_fp16_weights=False,
                threshold=THRESHOLD,
            )
        # as transformers deserializes: int8 data with its SCB; `.to` then takes the codes over, unchanged
        parameter = Int8Params(codes, requires_grad=False, has_fp16_weights=False, SCB=tensors[f"{module}.SCB"])
        made.weight = parameter.to(codes.device)  # type: ignore[misc]
        if linear.bias is not None:
            fill(made, "bias", tensors[f"{module}.bias"].to(dtype))
        # in training mode bitsandbytes computes on the CPU with dequantized weights, another result
        eight_bit: nn.Module = made.eval()
        return eight_bit


BNB_INT8 = BnbInt8(
    "bnb-int8",
    "int8 with one float32 scale per output row (bitsandbytes LLM.int8)",
    method="bitsandbytes",
    scheme="8-bit",
    stock_only=True,
    noisy="bitsandbytes",
)
