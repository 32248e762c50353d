"""The quantize step: what it plans is what it writes, stock transformers loads it, and the probe tells its logits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from compress.arch import family_of
from compress.checkpoint.headers import Header, TensorSpec, read_header
from compress.checkpoint.layout import SHARD_BYTES
from compress.checkpoint.reader import Reader
from compress.checkpoint.writer import Writer
from compress.errors import SelfCheckError, UserError
from compress.formats import FORMATS, format, open_stream
from compress.machine import Machine, Silent
from compress.steps.quantize.options import QuantizeOptions
from compress.steps.quantize.plan import PROBE, plan
from compress.steps.quantize.run import run
from compress.steps.types import Job, Outcome, PlanContext, StepPlan
from tests import stock as judge
from tests import tiny
from tests.matrix import CASES, DTYPES, Case

torch.set_num_threads(1)
PACKED = [name for name, how in FORMATS.items() if how.method]


def planned(
    before: Header, how: str, shard_bytes: int = SHARD_BYTES
) -> tuple[StepPlan | None, list[tuple[str, str, str | None]]]:
    complaints: list[tuple[str, str, str | None]] = []

    def complain(key: str, message: str, hint: str | None = None) -> None:
        complaints.append((key, message, hint))

    context = PlanContext(data={}, teacher=None, threads=1, shard_bytes=shard_bytes)
    return plan(before, QuantizeOptions(format=how), context, complain), complaints


def quantize(
    source: Path, target: Path, how: str, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> tuple[Job, Outcome]:
    header = read_header(source)
    made, complaints = planned(header, how, shard_bytes)
    assert made is not None and complaints == []
    machine = Machine(threads=1)
    job = Job(made, family_of(header), source, target, None, {}, seed, machine, Silent(), shard_bytes)
    return job, run(job)


def stock(folder: Path) -> nn.Module:
    """Loaded by stock transformers in the dtype its config names, nothing missing; then computing in float32.

    Not with dtype=float32: transformers 5.23 keeps the stored dtype of the weights of a bitsandbytes checkpoint, but
    casts its biases, and glm4v's vision tower then refuses to run.
    """
    model: nn.Module = judge.load(folder, "auto")
    for value in model.parameters():
        if value.is_floating_point():
            value.data = value.data.float()
    return model


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def divergence(reference: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Mean KL(reference || found) over positions, and the share of equal first choices."""
    p, q = reference.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).float().mean())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("sources")
    made = {("llama", name): tiny.llama(root / f"llama-{name}", dtype=DTYPES[name]) for name in ("F32", "BF16")}
    return {**made, ("glm4v", "BF16"): tiny.glm4v(root / "glm4v", dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def pico_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_written_is_planned_and_stock_logits_are_the_outcome(case: Case, pico_models: Path, tmp_path: Path) -> None:
    source, target = case.source(pico_models), tmp_path / "out"
    job, outcome = quantize(source, target, case.how, shard_bytes=100_000 if case.sharded else SHARD_BYTES)
    written = read_header(target)
    assert written.config == job.plan.after.config
    assert written.tensors == {**job.plan.after.tensors}
    assert job.plan.nbytes == weight_bytes(target) == outcome.receipt["bytes_after"]
    assert outcome.receipt["bytes_before"] == weight_bytes(source)
    model, dense = stock(target), stock(source)
    assert job.plan.parameters == sum(p.numel() for p in dense.parameters())
    with torch.no_grad():
        logits = model(input_ids=outcome.probe).logits
        reference = dense(input_ids=outcome.probe).logits
    torch.testing.assert_close(logits, outcome.logits, rtol=1e-4, atol=1e-4)
    with Reader(target) as reader:
        assert torch.equal(open_stream(reader, torch.float32).logits(outcome.probe), outcome.logits)
    kl, _ = divergence(reference, logits)
    assert kl <= 0.05
    if FORMATS[case.how].method or (case.dtype, case.how) == ("F32", "bf16"):
        assert not torch.equal(reference, logits)
    if (case.dtype, case.how) in [("BF16", "bf16"), ("F16", "fp16")]:
        assert torch.equal(reference, logits)


@pytest.mark.parametrize("how", [name for name, how in FORMATS.items() if not how.stock_only])
def test_a_family_that_only_vllm_loads_is_quantized_as_well(how: str, tmp_path: Path) -> None:
    """No stock class judges it; what the step computed in memory is what its stored tensors give."""
    source = tiny.glm4v_native(tmp_path / "source", dtype=torch.bfloat16)
    job, outcome = quantize(source, tmp_path / "out", how)
    assert read_header(tmp_path / "out").tensors == job.plan.after.tensors
    with Reader(tmp_path / "out") as reader:
        assert torch.equal(open_stream(reader, torch.float32).logits(outcome.probe), outcome.logits)


@pytest.mark.parametrize("how", PACKED)
def test_only_decoder_linears_change(how: str, sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = sources["glm4v", "BF16"]
    job, outcome = quantize(source, tmp_path / "out", how)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if name not in after or not torch.equal(after[name], before[name])}
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    kinds += ["mlp.gate_up_proj", "mlp.down_proj"]
    assert changed == {f"model.language_model.layers.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert outcome.receipt["linears"] == 12 == len(changed)
    assert set(outcome.receipt["rounding"]) == set(kinds)
    for kind in outcome.receipt["rounding"].values():
        assert kind["tensors"] == 2
        assert 0.001 < kind["mean_relative_error"] <= kind["max_relative_error"] < 0.02
    with torch.no_grad():
        image = tiny.image_inputs()
        reference = stock(source)(**image).logits
        kl, _ = divergence(reference, stock(tmp_path / "out")(**image).logits)
    assert kl <= 0.05
    assert job.plan.after.config["text_config"] == read_header(source).config["text_config"]


def test_rounding_errors_are_those_of_the_written_weights(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = sources["llama", "F32"]
    _, outcome = quantize(source, tmp_path / "out", "w8a16")
    before = load_file(source / "model.safetensors")
    model = stock(tmp_path / "out")
    model(input_ids=outcome.probe)
    errors = []
    for index in range(3):
        weight = before[f"model.layers.{index}.mlp.down_proj.weight"]
        restored = model.get_submodule(f"model.layers.{index}.mlp.down_proj").weight
        errors.append(float((restored - weight).norm() / weight.norm()))
    summary = outcome.receipt["rounding"]["mlp.down_proj"]
    assert summary["max_relative_error"] == pytest.approx(max(errors), rel=1e-4)
    assert summary["mean_relative_error"] == pytest.approx(sum(errors) / 3, rel=1e-4)


@pytest.mark.parametrize("how", FORMATS)
def test_same_bytes_again_in_blocks_and_from_shards(
    how: str, sources: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["llama", "F32"]
    _, first = quantize(source, tmp_path / "first", how)
    _, again = quantize(source, tmp_path / "again", how)
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "again")
    assert first.receipt == again.receipt and torch.equal(first.logits, again.logits)
    sharded = tiny.llama(tmp_path / "sharded", dtype=torch.float32, shard="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    monkeypatch.setattr(format, "BLOCK_BYTES", 5 * 64 * 4)
    _, blocks = quantize(sharded, tmp_path / "blocks", how)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "blocks"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(first.logits, blocks.logits)
    for kind, summary in first.receipt["rounding"].items():
        assert blocks.receipt["rounding"][kind] == pytest.approx(summary, rel=1e-5)


def test_another_seed_probes_other_ids(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    _, one = quantize(sources["llama", "BF16"], tmp_path / "one", "w8a16", seed=1)
    _, two = quantize(sources["llama", "BF16"], tmp_path / "two", "w8a16", seed=2)
    assert one.probe.shape == PROBE and int(one.probe.max()) < tiny.VOCAB // 2
    assert not torch.equal(one.probe, two.probe)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_output_in_several_shards(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    job, outcome = quantize(sources["llama", "BF16"], tmp_path / "out", "w8a16", shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert job.plan.nbytes == weight_bytes(tmp_path / "out")
    with torch.no_grad():
        logits = stock(tmp_path / "out")(input_ids=outcome.probe).logits
    torch.testing.assert_close(logits, outcome.logits, rtol=1e-4, atol=1e-4)


def test_bf16_of_bf16_copies_and_says_so(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    job, outcome = quantize(sources["llama", "BF16"], tmp_path / "out", "bf16")
    assert any("copied as they are" in note for note in job.plan.notes)
    assert outcome.receipt["rounding"] == {}
    name = "model.safetensors"
    one, other = (load_file(folder / name) for folder in (sources["llama", "BF16"], tmp_path / "out"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# values that do not fit


def _changed(source: Path, target: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one value replaced."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("how", "name", "value", "said"),
    [
        ("fp16", DOWN, 1e5, "overflows fp16"),
        ("fp16", "model.norm.weight", -1e5, "overflows fp16"),
        ("bnb-int8", DOWN, 1e5, "overflows fp16"),
        ("w8a16", DOWN, float("nan"), "NaN or infinite"),
        ("bf16", "model.norm.weight", float("inf"), "NaN or infinite"),
    ],
)
def test_values_that_do_not_fit_are_named_and_leave_nothing(
    how: str, name: str, value: float, said: str, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = _changed(sources["llama", "F32"], tmp_path / "source", name, value)
    with pytest.raises(UserError, match=said) as error:
        quantize(source, tmp_path / "out", how)
    assert name in error.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("how", "value"), [("w8a16", 1e5), ("w8a8", 1e5), ("bf16", 1e5)])
def test_formats_with_range_take_large_values(
    how: str, value: float, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = _changed(sources["llama", "F32"], tmp_path / "source", DOWN, value)
    _, outcome = quantize(source, tmp_path / "out", how)
    assert outcome.receipt["format"] == how


@pytest.mark.parametrize(("value", "zero", "subnormal"), [(1e-9, 1, 0), (1e-6, 0, 1), (1e-3, 0, 0)])
def test_fp16_counts_what_it_loses(
    value: float, zero: int, subnormal: int, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    _, plain = quantize(sources["llama", "F32"], tmp_path / "plain", "fp16")
    source = _changed(sources["llama", "F32"], tmp_path / "source", "model.norm.weight", value)
    _, outcome = quantize(source, tmp_path / "out", "fp16")
    assert outcome.receipt["flushed_to_zero"] == plain.receipt["flushed_to_zero"] + zero
    assert outcome.receipt["subnormal"] == plain.receipt["subnormal"] + subnormal


# planning


def test_plan_needs_no_torch() -> None:
    code = (
        "import sys, compress.steps.quantize.plan; sys.exit(sum(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match="unknown format 'bnb-int-8'; did you mean 'bnb-int8'"):
        QuantizeOptions(format="bnb-int-8")


@pytest.mark.parametrize("first", PACKED)
def test_a_quantized_input_is_refused(first: str, sources: dict[tuple[str, str], Path]) -> None:
    after, _ = planned(read_header(sources["llama", "BF16"]), first)
    assert after is not None
    made, complaints = planned(after.after, "bf16")
    assert made is None
    assert len(complaints) == 1 and f"quantized already ({first})" in complaints[0][1]


def test_a_foreign_quantization_is_refused(sources: dict[tuple[str, str], Path]) -> None:
    header = read_header(sources["llama", "BF16"])
    foreign = replace(header, config={**header.config, "quantization_config": {"quant_method": "awq"}})
    made, complaints = planned(foreign, "w8a16")
    assert made is None and [key for key, _, _ in complaints] == [""] and "'awq'" in complaints[0][1]


def test_a_checkpoint_without_linears_or_with_integers_is_refused(sources: dict[tuple[str, str], Path]) -> None:
    header = read_header(sources["llama", "BF16"])
    none = header.planned(header.config, [t for n, t in header.tensors.items() if "_proj" not in n])
    made, complaints = planned(none, "w8a16")
    assert made is None and "no linear" in complaints[0][1]
    odd = [replace(t, dtype="F8_E4M3") if n == DOWN else t for n, t in header.tensors.items()]
    made, complaints = planned(header.planned(header.config, odd), "w8a16")
    assert made is None and DOWN in complaints[0][1] and "F8_E4M3" in complaints[0][1]


def test_notes_say_what_stays_and_why(sources: dict[tuple[str, str], Path]) -> None:
    made, _ = planned(read_header(sources["glm4v", "BF16"]), "int8")
    assert made is not None
    assert "12 decoder linears become int8" in made.notes[0]
    assert "model.visual" in made.notes[1] and "because" in made.notes[1]


def test_ten_billion_parameters_are_planned_from_shapes() -> None:
    """GLM-4.1V-9B's decoder, from its shapes alone: the packed bytes, and a memory far below the model's."""
    text = {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2}
    text |= {"intermediate_size": 13696, "vocab_size": 151552}
    config = {"model_type": "glm4v", "text_config": text, "tie_word_embeddings": False}
    empty = Header(config, {}, {})
    shapes = family_of(empty).shapes(empty)
    header = empty.planned(config, [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()])
    made, complaints = planned(header, "int8")
    assert made is not None and complaints == []
    linears = sum(t.parameters for n, t in header.tensors.items() if ".layers." in n and len(t.shape) == 2)
    rows = sum(t.shape[0] for n, t in header.tensors.items() if ".layers." in n and len(t.shape) == 2)
    tensors = header.nbytes - linears + 4 * rows + 240
    assert made.after.nbytes == tensors
    assert tensors < made.nbytes < tensors + 2**18
    layer = sum(t.nbytes for name, t in made.after.tensors.items() if ".layers.0." in name)
    assert layer < made.memory < 0.75 * 2**30


def test_rows_out_of_turn_are_refused(tmp_path: Path) -> None:
    spec = TensorSpec("a", "F32", (4, 2))
    with pytest.raises(SelfCheckError, match="out of turn"), Writer(tmp_path / "gap", [spec]) as gap:
        gap.put_rows("a", 1, torch.ones(2, 2))
    with pytest.raises(SelfCheckError, match="not written"), Writer(tmp_path / "short", [spec]) as short:
        short.put_rows("a", 0, torch.ones(2, 2))
    with pytest.raises(SelfCheckError, match="planned rows"), Writer(tmp_path / "wide", [spec]) as wide:
        wide.put_rows("a", 0, torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []
