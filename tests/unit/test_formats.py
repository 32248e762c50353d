"""Every format: names and tables, what config.json is recognised as, and the codec both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.arch import FAMILIES, family_of
from compress.checkpoint.headers import Header, TensorSpec, read_header
from compress.errors import UserError
from compress.formats import ALIASES, FORMATS, PLAIN, decoder_linears, format, format_named, format_of
from tests import tiny
from tests.matrix import DTYPES

torch.set_num_threads(1)
PACKED = [name for name, how in FORMATS.items() if how.method]
COMPRESSED = [name for name in PACKED if FORMATS[name].method == "compressed-tensors"]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Header]:
    """The header of a bf16 pico model a family."""
    root = tmp_path_factory.mktemp("headers")
    return {name: read_header(getattr(tiny, name)(root / name, dtype=torch.bfloat16)) for name in FAMILIES}


def stored(header: Header, name: str) -> Header:
    """The header of the same checkpoint in another format."""
    return FORMATS[name].plan(header, decoder_linears(header, family_of(header)))


def matrix(rows: int = 40, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)).to(dtype)


# names and tables


def test_names_aliases_and_typos() -> None:
    assert list(FORMATS) == ["bf16", "fp16", "bnb-int8", "w8a16", "w8a8"]
    assert PACKED == ["bnb-int8", "w8a16", "w8a8"] and COMPRESSED == ["w8a16", "w8a8"]
    assert format_named("int8") is FORMATS["bnb-int8"]
    assert set(ALIASES.values()) <= set(FORMATS)
    with pytest.raises(UserError, match="did you mean 'w8a16'"):
        format_named("w8a61")


def test_importing_formats_needs_no_torch() -> None:
    code = "import sys, compress.formats; sys.exit(sum(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# what config.json says


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_format_of_reads_back_what_was_planned(family: str, name: str, headers: dict[str, Header]) -> None:
    header = headers[family]
    assert format_of(header) is PLAIN
    after = stored(header, name)
    assert format_of(after) is (FORMATS[name] if name in PACKED else PLAIN)
    assert set(format_of(after).linears(after)) == set(decoder_linears(header, family_of(header)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' is not supported"),
        ({"quant_method": ""}, "'' is not supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "other than 8-bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "pack-quantized .* or int-quantized"),
        ("int8", "found str"),
    ],
)
def test_foreign_quantization_is_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        format_of(Header({"model_type": "llama", "quantization_config": config}, {}, {}))


FOREIGN: list[tuple[tuple[str, ...], Any]] = [
    (("weights", "num_bits"), 4),
    (("weights", "symmetric"), False),
    (("weights", "strategy"), "group"),
    (("weights", "type"), "float"),
    (("weights", "dynamic"), True),
    (("weights",), None),
    (("input_activations",), {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": True}),
    (("input_activations",), {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": False}),
    (("input_activations",), {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}),
    (("output_activations",), {"num_bits": 8}),
    (("format",), "float-quantized"),
]


@pytest.mark.parametrize(
    ("path", "value"), FOREIGN, ids=[f"{'.'.join(path)}-{n}" for n, (path, _) in enumerate(FOREIGN)]
)
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_in_another_scheme_is_refused(
    name: str, path: tuple[str, ...], value: Any, headers: dict[str, Header]
) -> None:
    after = stored(headers["llama"], name)
    config = json.loads(json.dumps(after.config))
    group = config["quantization_config"]["config_groups"]["group_0"]
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = value
    assert format_of(after) is FORMATS[name]
    with pytest.raises(UserError, match="compressed-tensors"):
        format_of(Header(config, {}, {}))


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_cache_scheme", {"num_bits": 8}),
        ("transform_config", {"config_groups": {"R1": {}}}),
        ("quantization_status", "frozen"),  # stock transformers takes the codes for weights then
        ("quantization_status", None),
    ],
)
def test_what_would_change_the_result_is_refused(name: str, key: str, value: Any, headers: dict[str, Header]) -> None:
    config = json.loads(json.dumps(stored(headers["llama"], name).config))
    config["quantization_config"][key] = value
    with pytest.raises(UserError, match="compressed-tensors"):
        format_of(Header(config, {}, {}))


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_librarys_own_spelling_of_a_config_is_read(name: str, headers: dict[str, Header]) -> None:
    """Checkpoints of other tools: every argument spelled out, as compressed-tensors dumps its own config."""
    from compressed_tensors.quantization import QuantizationConfig

    config = dict(stored(headers["glm4v"], name).config)
    dumped = QuantizationConfig.model_validate(config["quantization_config"]).to_dict()
    assert dumped["config_groups"]["group_0"]["weights"]["group_size"] is None
    spelled = {"version": "0.12", "sparsity_config": {}, "transform_config": {}, "kv_cache_scheme": None, **dumped}
    assert format_of(Header({**config, "quantization_config": spelled}, {}, {})) is FORMATS[name]


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_config_is_what_compressed_tensors_means(name: str, headers: dict[str, Header]) -> None:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    layout = {"w8a16": "pack-quantized", "w8a8": "int-quantized"}[name]
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel", dynamic=False)
    tokens = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=tokens if name == "w8a8" else None, format=layout
    )
    meant = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=layout,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", "re:.*visual.*"],
    )
    found = stored(headers["glm4v"], name).config["quantization_config"]
    assert QuantizationConfig.model_validate(found).to_dict() == meant.to_dict()


def test_plain_casts_every_float_and_every_dtype_key() -> None:
    config = {"model_type": "glm4v", "torch_dtype": "float32", "dtype": "float32"}
    config |= {"text_config": {"dtype": "float32"}, "vision_config": {"torch_dtype": "float32", "depth": 2}}
    tensors = [TensorSpec("a.weight", "F32", (4, 4)), TensorSpec("a.ids", "I64", (3,)), TensorSpec("b", "F64", (2,))]
    after = FORMATS["fp16"].plan(Header(config, {t.name: t for t in tensors}, {}), ())
    assert [t.dtype for t in after.tensors.values()] == ["F16", "I64", "F16"]
    assert after.config == {
        "model_type": "glm4v",
        "torch_dtype": "float16",
        "dtype": "float16",
        "text_config": {"dtype": "float16"},
        "vision_config": {"torch_dtype": "float16", "depth": 2},
    }
    assert config["text_config"] == {"dtype": "float32"}


@pytest.mark.parametrize("name", PACKED)
def test_a_config_that_contradicts_the_packed_shapes_is_refused(name: str, headers: dict[str, Header]) -> None:
    after = stored(headers["llama"], name)
    wrong = after.planned({**after.config, "intermediate_size": 80}, after.tensors.values())
    with pytest.raises(UserError, match=r"mlp\.down_proj.*found \[64, "):
        FORMATS[name].logical(wrong)


# codecs


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", PACKED)
def test_packing_is_round_to_nearest(name: str, dtype: torch.dtype) -> None:
    """Half a step off at most; bitsandbytes rounds to fp16 (11 bits) first."""
    how, weight = FORMATS[name], matrix(dtype=dtype)
    packed = how.pack("m", weight)
    error = (how.unpack("m", packed, torch.float32) - weight.float()).abs()
    half_step = 0.5 * (packed["m.SCB"].view(-1, 1) / 127 if name == "bnb-int8" else packed["m.weight_scale"].float())
    first = weight.float().abs() * 2.0**-11 + 2.0**-25 if name == "bnb-int8" else 0.0
    assert (error <= half_step * 1.00001 + first).all()
    assert (error > half_step * 0.9).any()


@pytest.mark.parametrize("name", PACKED)
def test_blocks_of_rows_give_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FORMATS[name].pack("m", matrix())
    monkeypatch.setattr(format, "BLOCK_BYTES", 7 * 64 * 4)
    assert list(format.row_blocks(40, 64)) == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 35), (35, 40)]
    blocks = FORMATS[name].pack("m", matrix())
    assert blocks.keys() == whole.keys() == set(FORMATS[name].tensor_names("m"))
    assert all(torch.equal(blocks[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", PACKED)
def test_a_row_of_zeros_stays_zero(name: str) -> None:
    weight = matrix()
    weight[3] = 0
    packed = FORMATS[name].pack("m", weight)
    if name in COMPRESSED:  # no loader divides by zero, and the codes are zero, not what a NaN becomes
        assert packed["m.weight_scale"][3] == 1
    if name == "w8a16":
        assert (packed["m.weight_packed"][3].view(torch.uint8) == 128).all()
    restored = FORMATS[name].unpack("m", packed, torch.float32)
    assert (restored[3] == 0).all() and torch.isfinite(restored).all() and (restored[2] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bnb_codes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    weight = matrix(256, 512, dtype)
    weight[3] = 0
    packed = FORMATS["bnb-int8"].pack("m", weight)
    codes, scale, _ = int8_vectorwise_quant(weight.half())
    assert torch.equal(packed["m.weight"], codes) and torch.equal(packed["m.SCB"], scale)
    assert packed["m.weight_format"].shape == () and packed["m.weight_format"].dtype == torch.uint8
    restored = FORMATS["bnb-int8"].unpack("m", packed, torch.float32)
    assert torch.equal(restored, int8_vectorwise_dequant(codes, scale))


@pytest.mark.parametrize("columns", [64, 90, 93])
def test_w8a16_words_are_those_of_compressed_tensors(columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    weight = matrix(40, columns)
    packed = FORMATS["w8a16"].pack("m", weight)
    codes = unpack_from_int32(packed["m.weight_packed"], 8, torch.Size(packed["m.weight_shape"].tolist()))
    assert torch.equal(pack_to_int32(codes, 8), packed["m.weight_packed"])
    scale = packed["m.weight_scale"].float()
    assert torch.equal(codes, torch.round(weight.float() / scale).clamp(-128, 127).to(torch.int8))
    assert torch.equal(scale, (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype).float())
    assert codes.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_w8a8_codes_are_those_of_compressed_tensors_for_the_same_scale(dtype: torch.dtype) -> None:
    """`quantize` divides in the weight's own dtype; in float32, which we round from, the two are one."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    weight = matrix(40, 93, dtype)
    packed = FORMATS["w8a8"].pack("m", weight)
    assert packed["m.weight"].dtype == torch.int8 and packed["m.weight_scale"].dtype == dtype
    arguments = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scale = packed["m.weight_scale"]
    codes = quantize(weight.float(), scale.float(), None, arguments, torch.int8)
    assert torch.equal(packed["m.weight"], codes)
    assert torch.equal(FORMATS["w8a8"].unpack("m", packed, dtype), dequantize(codes, scale, None, arguments))
    packed16 = FORMATS["w8a16"].pack("m", weight)
    assert torch.equal(FORMATS["w8a16"].unpack("m", packed16, dtype), FORMATS["w8a8"].unpack("m", packed, dtype))


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_largest_value_of_tiny_fp16_rows_is_kept(name: str) -> None:
    """178 / 127 fp16 subnormals would round to a scale of 1, and 178 clip to 127."""
    weight = torch.tensor([[178.0, 89.0, -178.0, 44.0]]).mul(2.0**-24).half()
    packed = FORMATS[name].pack("m", weight)
    restored = FORMATS[name].unpack("m", packed, torch.float32)
    assert (restored - weight.float()).abs().max() <= packed["m.weight_scale"].float().max() * 0.5


@pytest.mark.parametrize("name", ["bnb-int8", "fp16"])
def test_fp16_overflow_is_named(name: str) -> None:
    weight = matrix()
    weight[5, 5] = 70000
    with pytest.raises(UserError, match=r"tensor 'a\.m\.weight' overflows fp16 \(max 70144"):
        FORMATS[name].pack("a.m", weight)


# counting


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "glm46v"])
def test_logical_parameters_are_those_of_the_stock_model(family: str, name: str, headers: dict[str, Header]) -> None:
    from compress.stream.stock import stock_model

    header = headers[family]
    count = sum(p.numel() for p in stock_model(header.config).parameters())
    assert PLAIN.parameters(header, family_of(header)) == count
    after = stored(header, name)
    assert FORMATS[name].parameters(after, family_of(after)) == count
    logical = FORMATS[name].logical(after)
    assert {n: t.shape for n, t in logical.items()} == {n: t.shape for n, t in header.tensors.items()}


def test_tied_heads_and_rotary_buffers_are_not_counted(tmp_path: Path) -> None:
    from compress.stream.stock import stock_model

    header = read_header(tiny.llama(tmp_path / "tied", tie_word_embeddings=True))
    count = sum(p.numel() for p in stock_model(header.config).parameters())
    extra = [
        TensorSpec("lm_head.weight", "F32", (tiny.VOCAB, 64)),
        TensorSpec("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,)),
    ]
    assert PLAIN.parameters(header, family_of(header)) == count
    more = header.planned(header.config, [*header.tensors.values(), *extra])
    assert PLAIN.parameters(more, family_of(header)) == count
