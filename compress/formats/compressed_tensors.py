"""compressed-tensors, 8-bit weights with one scale per output row: W8A16 (`pack-quantized`) and W8A8 (`int-quantized`).

weight = code * P.weight_scale [out, 1], which lies in the weight's own dtype. Codes are rounded to nearest against the
scale as it is stored, so the scale's own rounding costs nothing. W8A16 packs four codes into an int32 and is exact to
decompress; W8A8 stores them as int8, and whoever runs it rounds the inputs of every linear to int8, token by token.
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
    from torch import nn

METHOD = "compressed-tensors"
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
# what compressed-tensors takes a group's arguments for where they are not said
SILENT = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "scale_dtype": None}


@dataclass(frozen=True)
class CompressedTensors(Format):
    """Int8 per output row, symmetric. `layout`: the library's name; `rounds_inputs`: activations are int8 too."""

    layout: str = ""
    rounds_inputs: bool = False

    def describes(self, quantization: Mapping[str, Any]) -> bool:
        if any(quantization.get(key) for key in ("kv_cache_scheme", "transform_config")):
            return False
        if quantization.get("quantization_status") != "compressed":  # stock transformers would take codes for weights
            return False
        groups = quantization.get("config_groups")
        return isinstance(groups, Mapping) and bool(groups) and all(self._is(g, quantization) for g in groups.values())

    def _is(self, group: Any, quantization: Mapping[str, Any]) -> bool:
        """Whether a group of `config_groups` is the one that `config` writes."""
        if not isinstance(group, Mapping) or group.get("output_activations") is not None:
            return False
        if (group.get("format") or quantization.get("format")) != self.layout:
            return False
        inputs = group.get("input_activations")
        if not (_says(inputs, TOKENS) if self.rounds_inputs else inputs is None):
            return False
        return _says(group.get("weights"), WEIGHTS)

    def config(self, header: Header, linears: Sequence[str]) -> dict[str, Any]:
        # a skipped tower becomes a regex on its last part: loaders rename what stands before it (model.visual, visual)
        towers = {name for name in family_of(header).skip if "." in name}
        names = left_plain(header, linears)
        ignore = [f"re:.*{name.rsplit('.', 1)[-1]}.*" if name in towers else name for name in names]
        inputs = dict(TOKENS) if self.rounds_inputs else None
        group = {
            "targets": ["Linear"],
            "weights": dict(WEIGHTS),
            "input_activations": inputs,
            "format": self.layout,
        }
        quantization = {
            "quant_method": METHOD,
            "quantization_status": "compressed",
            "format": self.layout,
            "ignore": ignore,
            "config_groups": {"group_0": group},
        }
        return {**header.config, "quantization_config": quantization}


@dataclass(frozen=True)
class W8A16(CompressedTensors):
    """P.weight_packed int32 [out, ceil(in/4)]: four codes + 128 a word, the first in the lowest byte."""

    def stored(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        module, (rows, columns) = weight.name.removesuffix(".weight"), weight.shape
        return (
            TensorSpec(f"{module}.weight_packed", "I32", (rows, -(-columns // 4))),
            _scale_spec(weight),
            TensorSpec(f"{module}.weight_shape", "I64", (2,)),
        )

    def linears(self, header: Header) -> tuple[str, ...]:
        suffix = ".weight_packed"
        return tuple(name.removesuffix(suffix) for name in header.tensors if name.endswith(suffix))

    def pack_rows(self, module: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        codes, scale = _codes(rows)
        words = codes.view(torch.uint8).bitwise_xor_(128)  # the byte of code + 128
        packed = torch.nn.functional.pad(words, (0, -words.shape[1] % 4)).contiguous().view(torch.int32)
        return {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale}

    def constants(self, module: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        import torch

        return {f"{module}.weight_shape": torch.tensor(shape, dtype=torch.int64)}

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        import torch

        columns = int(tensors[f"{module}.weight_shape"][1])
        words = tensors[f"{module}.weight_packed"].view(torch.uint8)[:, :columns]
        return _restored(words.bitwise_xor(128).view(torch.int8), tensors[f"{module}.weight_scale"], dtype)


@dataclass(frozen=True)
class W8A8(CompressedTensors):
    """P.weight int8 [out, in]."""

    def stored(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec(weight.name, "I8", weight.shape), _scale_spec(weight))

    def linears(self, header: Header) -> tuple[str, ...]:
        suffix = ".weight_scale"
        return tuple(name.removesuffix(suffix) for name in header.tensors if name.endswith(suffix))

    def pack_rows(self, module: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale = _codes(rows)
        return {f"{module}.weight": codes, f"{module}.weight_scale": scale}

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return _restored(tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"], dtype)

    def module(
        self, linear: nn.Linear, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> nn.Module:
        """A linear whose inputs compressed-tensors itself rounds, as stock transformers runs it."""
        import torch
        from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus  # type: ignore[import-untyped]
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize  # type: ignore[import-untyped]
        from torch import nn

        with torch.device("meta"):  # one of its own: the stock linear is used again, for another layer's tensors
            made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        super().module(made, module, tensors, dtype)
        tokens = QuantizationArgs(**TOKENS)

        def rounded(linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (forward_quantize(linear, inputs[0], "input", tokens),)

        # a hook, not the library's own new `forward`: that one is bound to its module, and memory would wait for gc
        made.register_forward_pre_hook(rounded)
        made.quantization_status = QuantizationStatus.DECOMPRESSED
        return made


def _says(arguments: Any, expected: Mapping[str, Any]) -> bool:
    """Whether the arguments of a group are `expected`, the library's defaults filled in."""
    if not isinstance(arguments, Mapping):
        return False
    said = {**SILENT, **arguments}
    return all(said.get(key) == value for key, value in {"scale_dtype": None, **expected}.items())


def _scale_spec(weight: TensorSpec) -> TensorSpec:
    module = weight.name.removesuffix(".weight")
    dtype = "F32" if weight.dtype == "F64" else weight.dtype
    return TensorSpec(f"{module}.weight_scale", dtype, (weight.shape[0], 1))


def _codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [r, in] and scales [r, 1] of some rows."""
    import torch

    dtype = torch.float32 if rows.dtype == torch.float64 else rows.dtype
    wide = rows.float()
    scale = _scale(wide.abs().amax(dim=1, keepdim=True), dtype)
    return (wide / scale.float()).round_().clamp_(-128, 127).to(torch.int8), scale


def _scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """max |row| / 127 [rows, 1] in `dtype`, one step up where its rounding (fp16 subnormals) would clip the largest
    value; 1 for a row of zeros."""
    import torch

    scale = (largest / 127.0).to(dtype).float()
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = torch.where(scale * 127.5 < largest, scale + step, scale)
    return torch.where(largest == 0, 1.0, scale).to(dtype)


def _restored(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """code * scale [out, in]: stock transformers casts the scale to the model's dtype and multiplies there."""
    return codes.to(dtype).mul_(scale.to(dtype))


_ROWS = "(quantization_status compressed) with 8-bit symmetric weights per channel"
W8A16_FORMAT = W8A16(
    "w8a16",
    "int8 packed in int32 with one scale per output row (compressed-tensors pack-quantized)",
    method=METHOD,
    scheme=f"pack-quantized {_ROWS}",
    layout="pack-quantized",
)
W8A8_FORMAT = W8A8(
    "w8a8",
    "int8 with one scale per output row, their inputs int8 per token (compressed-tensors int-quantized)",
    method=METHOD,
    scheme=f"int-quantized {_ROWS} and dynamic 8-bit inputs per token",
    layout="int-quantized",
    rounds_inputs=True,
)
