"""Every format: the codec both ways, the bytes that bitsandbytes and compressed-tensors write, reload in stock code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from compress.arch import family_of
from compress.checkpoint.headers import Header, TensorSpec, read_header
from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.errors import UserError
from compress.formats import ALIASES, FORMATS, PLAIN, Format, decoder_linears, format, format_named, format_of
from tests import tiny

torch.set_num_threads(1)
PACKED = ["bnb-int8", "w8a16"]
MODELS = {"llama": (tiny.llama, AutoModelForCausalLM), "glm4v": (tiny.glm4v, AutoModelForImageTextToText)}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def store(source: Path, target: Path, how: Format) -> Header:
    """The checkpoint `source` in another format, by the format's own functions only."""
    with Reader(source) as reader:
        header = reader.header
        linears = decoder_linears(header, family_of(header))
        after = how.plan(header, linears)
        with Writer(target, after.tensors.values()) as writer:
            writer.carry(source)
            writer.config(after.config, source)
            for name in header.tensors:
                if name.removesuffix(".weight") in linears:
                    for key, value in how.pack(name.removesuffix(".weight"), reader.tensor(name)).items():
                        writer.put(key, value)
                else:
                    writer.put(name, how.cast(name, reader.tensor(name)))
    return after


def stock(kind: str, folder: Path, **options: Any) -> nn.Module:
    """Loaded by stock transformers, with nothing missing, unexpected or mismatched."""
    model, info = MODELS[kind][1].from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("sources")
    made = {}
    for kind, (make, _) in MODELS.items():
        for name, dtype in DTYPES.items():
            made[kind, name] = make(root / f"{kind}-{name}", dtype=dtype)
    return made


def matrix(rows: int = 40, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)).to(dtype)


# names and tables


def test_names_aliases_and_typos() -> None:
    assert set(FORMATS) == {"bf16", "fp16", "bnb-int8", "w8a16"}
    assert format_named("int8") is FORMATS["bnb-int8"]
    assert set(ALIASES.values()) <= set(FORMATS)
    with pytest.raises(UserError, match="did you mean 'w8a16'"):
        format_named("w8a61")


def test_importing_formats_needs_no_torch() -> None:
    code = "import sys, compress.formats; sys.exit(sum(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_format_of_reads_back_what_was_planned(kind: str, name: str, sources: dict[tuple[str, str], Path]) -> None:
    header = read_header(sources[kind, "BF16"])
    assert format_of(header) is PLAIN
    linears = decoder_linears(header, family_of(header))
    after = FORMATS[name].plan(header, linears)
    assert format_of(after) is (FORMATS[name] if name in PACKED else PLAIN)
    assert set(format_of(after).linears(after)) == set(linears)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "other than 8-bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "pack-quantized, 8 bits"),
        ("int8", "found str"),
    ],
)
def test_foreign_quantization_is_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        format_of(Header({"model_type": "llama", "quantization_config": config}, {}, {}))


@pytest.mark.parametrize("key", ["num_bits", "symmetric", "strategy", "type", "dynamic", "activations", "format"])
def test_compressed_tensors_in_another_scheme_is_refused(key: str, sources: dict[tuple[str, str], Path]) -> None:
    after = FORMATS["w8a16"].plan(read_header(sources["llama", "BF16"]), ())
    config = json.loads(json.dumps(after.config))
    group = config["quantization_config"]["config_groups"]["group_0"]
    other = {"num_bits": 4, "symmetric": False, "strategy": "group", "type": "float", "dynamic": True}
    if key in other:
        group["weights"][key] = other[key]
    elif key == "activations":
        group["input_activations"] = {"num_bits": 8, "dynamic": True}
    else:
        group["format"] = "int-quantized"
    assert format_of(after) is FORMATS["w8a16"]
    with pytest.raises(UserError, match="compressed-tensors"):
        format_of(Header(config, {}, {}))


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
    if name == "w8a16":  # no loader divides by zero, and the codes are zero, not what a NaN becomes
        assert packed["m.weight_scale"][3] == 1 and (packed["m.weight_packed"][3].view(torch.uint8) == 128).all()
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


def test_w8a16_config_is_what_compressed_tensors_means(sources: dict[tuple[str, str], Path]) -> None:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    header = read_header(sources["glm4v", "BF16"])
    after = FORMATS["w8a16"].plan(header, decoder_linears(header, family_of(header)))
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel", dynamic=False)
    meant = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")},
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", "re:.*visual.*"],
    )
    assert QuantizationConfig.model_validate(after.config["quantization_config"]).to_dict() == meant.to_dict()


def test_w8a16_keeps_the_largest_value_of_tiny_fp16_rows() -> None:
    """178 / 127 fp16 subnormals would round to a scale of 1, and 178 clip to 127."""
    weight = torch.tensor([[178.0, 89.0, -178.0, 44.0]]).mul(2.0**-24).half()
    packed = FORMATS["w8a16"].pack("m", weight)
    restored = FORMATS["w8a16"].unpack("m", packed, torch.float32)
    assert (restored - weight.float()).abs().max() <= packed["m.weight_scale"].float().max() * 0.5


@pytest.mark.parametrize("name", ["bnb-int8", "fp16"])
def test_fp16_overflow_is_named(name: str) -> None:
    weight = matrix()
    weight[5, 5] = 70000
    with pytest.raises(UserError, match=r"tensor 'a\.m\.weight' overflows fp16 \(max 70144"):
        FORMATS[name].pack("a.m", weight)


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


# stock loading


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_bnb_folder_is_the_one_that_stock_transformers_writes(
    kind: str, dtype: str, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = sources[kind, dtype]
    store(source, tmp_path / "ours", FORMATS["bnb-int8"])
    skip = ["lm_head", "model.visual"] if kind == "glm4v" else ["lm_head"]
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    model = MODELS[kind][1].from_pretrained(source, quantization_config=config, dtype=DTYPES[dtype])
    model.save_pretrained(tmp_path / "stock")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(tmp_path / "stock" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    different = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]
    assert different == []


@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_stock_loader_sees_our_weights_bit_for_bit(
    name: str, kind: str, dtype: str, load: torch.dtype, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    how, source = FORMATS[name], sources[kind, dtype]
    after = store(source, tmp_path / "out", how)
    model = stock(kind, tmp_path / "out", dtype=load)
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)  # compressed-tensors decompresses at the first forward
    linears = decoder_linears(read_header(source), family_of(after))
    with Reader(tmp_path / "out") as reader:
        for module, linear in model.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            eight_bit = type(linear).__name__ == "Linear8bitLt"
            assert eight_bit == (name == "bnb-int8" and module in linears)
            if eight_bit:
                assert torch.equal(linear.state.CB, reader.tensor(f"{module}.weight"))
                assert torch.equal(linear.state.SCB, reader.tensor(f"{module}.SCB"))
                assert linear.state.threshold == 6.0
            elif module in linears:
                stored = {key: reader.tensor(key) for key in how.tensor_names(module)}
                assert torch.equal(linear.weight, how.unpack(module, stored, load))
                assert linear.weight.dtype == load


@pytest.mark.parametrize("load", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_our_modules_compute_what_the_stock_model_computes(
    name: str, kind: str, dtype: str, load: torch.dtype, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Read from the output, and packed in memory from the source: each linear's outputs equal, bit for bit."""
    how, source = FORMATS[name], sources[kind, dtype]
    store(source, tmp_path / "out", how)
    model = stock(kind, tmp_path / "out", dtype=load)
    inputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    linears = decoder_linears(read_header(source), family_of(read_header(source)))
    for module in linears:

        def keep(_: nn.Module, args: Any, out: torch.Tensor, module: str = module) -> None:
            inputs[module] = (args[0].clone(), out.clone())

        model.get_submodule(module).register_forward_hook(keep)
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)
    with Reader(tmp_path / "out") as stored, Reader(source) as plain, torch.no_grad():
        for module in linears:
            old = model.get_submodule(module)
            x, expected = inputs[module]
            for make, reader in ((how.load, stored), (how.repack, plain)):
                meta = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
                assert torch.equal(make(reader, meta, module, load)(x), expected)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_logical_parameters_are_those_of_the_stock_model(
    name: str, kind: str, sources: dict[tuple[str, str], Path]
) -> None:
    header = read_header(sources[kind, "F32"])
    family = family_of(header)
    count = sum(p.numel() for p in stock(kind, sources[kind, "F32"]).parameters())
    assert PLAIN.parameters(header, family) == count
    after = FORMATS[name].plan(header, decoder_linears(header, family))
    assert FORMATS[name].parameters(after, family) == count
    logical = FORMATS[name].logical(after)
    assert {n: t.shape for n, t in logical.items()} == {n: t.shape for n, t in header.tensors.items()}


def test_tied_heads_and_rotary_buffers_are_not_counted(tmp_path: Path) -> None:
    header = read_header(tiny.llama(tmp_path / "tied", tie_word_embeddings=True))
    count = sum(p.numel() for p in stock("llama", tmp_path / "tied").parameters())
    extra = [
        TensorSpec("lm_head.weight", "F32", (tiny.VOCAB, 64)),
        TensorSpec("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,)),
    ]
    assert PLAIN.parameters(header, family_of(header)) == count
    more = header.planned(header.config, [*header.tensors.values(), *extra])
    assert PLAIN.parameters(more, family_of(header)) == count


@pytest.mark.parametrize("name", PACKED)
def test_a_config_that_contradicts_the_packed_shapes_is_refused(
    name: str, sources: dict[tuple[str, str], Path]
) -> None:
    header = read_header(sources["llama", "BF16"])
    after = FORMATS[name].plan(header, decoder_linears(header, family_of(header)))
    wrong = after.planned({**after.config, "intermediate_size": 80}, after.tensors.values())
    with pytest.raises(UserError, match=r"mlp\.down_proj.*found \[64, "):
        FORMATS[name].logical(wrong)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", MODELS)
def test_linears_left_out_are_left_alone_by_the_stock_loader(
    kind: str, name: str, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """A checkpoint with one decoder linear unpacked: the config names it, and a stream reads it as it is."""
    source, how = sources[kind, "BF16"], FORMATS[name]
    with Reader(source) as reader:
        header = reader.header
        left, *linears = decoder_linears(header, family_of(header))
        after = how.plan(header, linears)
        with Writer(tmp_path / "out", after.tensors.values()) as writer:
            writer.carry(source)
            writer.config(after.config, source)
            for key in header.tensors:
                module = key.removesuffix(".weight")
                packed = how.pack(module, reader.tensor(key)) if module in linears else {key: reader.tensor(key)}
                for stored, value in packed.items():
                    writer.put(stored, value)
        model = stock(kind, tmp_path / "out")
        weight = model.get_submodule(left).weight
        assert torch.equal(weight, reader.tensor(f"{left}.weight"))
    with Reader(tmp_path / "out") as reader:
        old = model.get_submodule(left)
        meta = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        assert torch.equal(how.load(reader, meta, left, torch.bfloat16).weight, weight)
