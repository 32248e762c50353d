"""The distill step on pico models: a model taught by itself keeps its bytes, reruns repeat, mistakes are one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers.models.llama.modeling_llama import LlamaMLP

from compress.arch import family_of
from compress.checkpoint.headers import Header, TensorSpec, read_header
from compress.checkpoint.reader import Reader
from compress.data import DataSpec, windows
from compress.errors import UserError
from compress.machine import Machine, Precision, Silent, cpu_precision
from compress.steps.distill import plan as planning
from compress.steps.distill.options import DistillOptions
from compress.steps.distill.plan import plan
from compress.steps.distill.run import run, training_order
from compress.steps.distill.trainer import Decoder, schedule
from compress.steps.types import Job, Outcome, PlanContext, StepPlan
from tests import tiny

DATA = {"training": DataSpec(length=64, samples=12)}
FLOAT32 = Precision(False, "float32, because the test says so")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact properties must not depend on the processor that runs the tests."""
    monkeypatch.setattr("compress.steps.distill.plan.cpu_precision", lambda: FLOAT32)
    monkeypatch.setattr("compress.steps.distill.run.precision_of", lambda device: FLOAT32)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student of the same shapes and other weights; the student's matrices are tied and bf16."""
    folder = tmp_path_factory.mktemp("llamas")
    student = tiny.llama(folder / "student", seed=2, dtype=torch.bfloat16, tie_word_embeddings=True)
    return tiny.llama(folder / "teacher", seed=1), student


def planned(
    source: Header, teacher: Header | None, options: DistillOptions, data: Mapping[str, DataSpec] = DATA
) -> tuple[StepPlan | None, list[tuple[str, str]]]:
    said: list[tuple[str, str]] = []

    def complain(key: str, message: str, hint: str | None = None) -> None:
        said.append((key, message))

    context = PlanContext(data=data, teacher=teacher, threads=1)
    return plan(source, options, context, complain), said


def distil(source: Path, teacher: Path, target: Path, seed: int = 0, **options: Any) -> Outcome:
    header = read_header(source)
    made, said = planned(header, read_header(teacher), DistillOptions(**options))
    assert made is not None, said
    return run(Job(made, family_of(header), source, target, teacher, DATA, seed, Machine(1), Silent()))


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def stock_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("family", ["llama", "glm4v"])
def test_a_model_taught_by_itself_keeps_its_bytes(tmp_path: Path, family: str) -> None:
    source = getattr(tiny, family)(tmp_path / "source")
    outcome = distil(source, source, tmp_path / "out", learning_rate=1.0)
    assert outcome.receipt["losses"] == [0.0] * 3
    with Reader(source) as before, Reader(tmp_path / "out") as after:
        assert set(before.header.tensors) == set(after.header.tensors)
        for name in before.header.tensors:
            assert torch.equal(before.tensor(name), after.tensor(name)), name


def test_training_brings_the_student_nearer_and_repeats(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = llamas
    first = distil(student, teacher, tmp_path / "a", epochs=6.0, learning_rate=3e-3)
    second = distil(student, teacher, tmp_path / "b", epochs=6.0, learning_rate=3e-3)
    losses = first.receipt["losses"]
    assert len(losses) == 18 and sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert first.receipt == second.receipt and digests(tmp_path / "a") == digests(tmp_path / "b")
    other = distil(student, teacher, tmp_path / "c", seed=1, epochs=6.0, learning_rate=3e-3)
    assert other.receipt["losses"] != losses


def test_batches_are_the_planned_windows_in_their_order(
    llamas: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = llamas
    batches: list[torch.Tensor] = []
    plain = Decoder.hidden
    monkeypatch.setattr(Decoder, "hidden", lambda self, ids: batches.append(ids) or plain(self, ids))
    distil(student, teacher, tmp_path / "out", batch=5, epochs=2.0)
    ids = windows(DATA["training"], "training", student, 0).ids
    expected = training_order(ids, DistillOptions(batch=5, epochs=2.0), 0)
    np.testing.assert_array_equal(torch.cat(batches[::2]).numpy(), expected)  # the teacher's batches
    np.testing.assert_array_equal(torch.cat(batches[1::2]).numpy(), expected)  # the student's


def test_what_is_written(llamas: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher, student = llamas
    outcome = distil(student, teacher, tmp_path / "out", max_steps=2, learning_rate=1e-2)
    before, after = read_header(student), read_header(tmp_path / "out")
    assert after.tensors == before.tensors and after.dtype == "BF16"
    assert "lm_head.weight" not in after.tensors, "tied on disk stays tied on disk"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in student.iterdir()}
    assert digests(tmp_path / "out")["config.json"] == digests(student)["config.json"]
    assert tuple(outcome.probe.shape) == (2, 64) and outcome.logits.dtype == torch.float32
    assert torch.equal(stock_logits(tmp_path / "out", outcome.probe), outcome.logits)
    assert not torch.equal(stock_logits(student, outcome.probe), outcome.logits)
    json.dumps(outcome.receipt)
    assert "seconds" not in json.dumps(outcome.receipt) and outcome.measured["training_seconds"] > 0
    with Reader(student) as old, Reader(tmp_path / "out") as new:
        changed = [name for name in before.tensors if not torch.equal(old.tensor(name), new.tensor(name))]
    assert set(changed) == set(before.tensors)
    assert "train_runtime" not in "".join(capfd.readouterr())


def test_the_vision_tower_passes_through(tmp_path: Path) -> None:
    student = tiny.glm4v(tmp_path / "student", seed=3, dtype=torch.bfloat16)
    teacher = tiny.glm4v(tmp_path / "teacher", seed=4, dtype=torch.bfloat16)
    outcome = distil(student, teacher, tmp_path / "out", max_steps=2, learning_rate=1e-2)
    assert torch.equal(stock_logits(tmp_path / "out", outcome.probe), outcome.logits)
    with Reader(student) as old, Reader(tmp_path / "out") as new:
        for name in old.header.tensors:
            same = torch.equal(old.tensor(name), new.tensor(name))
            assert same == name.startswith("model.visual."), name


@pytest.mark.usefixtures("float32")
def test_computing_layers_twice_changes_nothing(
    llamas: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = llamas
    once = distil(student, teacher, tmp_path / "once", max_steps=3)
    monkeypatch.setattr(planning, "CHECKPOINTING", 0)
    calls: list[bool] = []  # whether each MLP forward was one of training
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(self.training) or plain(self, x))
    twice = distil(student, teacher, tmp_path / "twice", max_steps=3)
    assert sum(calls) == 2 * 3 * 3, "three steps, three layers, each twice"
    assert once.receipt == twice.receipt and digests(tmp_path / "once") == digests(tmp_path / "twice")


def test_a_diverging_run_names_step_and_rate(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = llamas
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+ \(learning rate \d") as caught:
        distil(student, teacher, tmp_path / "out", epochs=3.0, learning_rate=1e30, warmup=0.0)
    assert caught.value.hint is not None and "learning_rate" in caught.value.hint
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_weights_that_leave_the_dtype_on_disk_are_refused(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "half", seed=5, dtype=torch.float16)
    with pytest.raises(UserError, match="left the range of float16"):
        distil(source, llamas[0], tmp_path / "out", max_steps=1, learning_rate=1e6, warmup=0.0)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_nan_is_named(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    teacher = tiny.llama(tmp_path / "teacher", seed=1)
    weights = load_file(teacher / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' holds NaN"):
        distil(llamas[1], teacher, tmp_path / "out")


def test_a_teacher_that_reads_other_tokens(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = tiny.llama(tmp_path / "teacher", seed=1)
    content = json.loads((teacher / "tokenizer.json").read_text())
    (teacher / "tokenizer.json").write_text(json.dumps(content, indent=4))
    assert digests(teacher)["tokenizer.json"] != digests(llamas[1])["tokenizer.json"]
    distil(llamas[1], teacher, tmp_path / "same-ids", max_steps=1)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the teacher's tokenizer gives other token ids"):
        distil(llamas[1], teacher, tmp_path / "out", max_steps=1)


def test_all_complaints_at_once(llamas: tuple[Path, Path]) -> None:
    header = read_header(llamas[1])
    wide = replace(header, config={**header.config, "vocab_size": 400})
    made, said = planned(header, wide, DistillOptions())
    assert made is None
    assert said == [
        ("", "the teacher has another vocabulary: 400 tokens, the model has 384"),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "the teacher is quantized"),
        ({"model_type": "lama"}, "the teacher's config.json: model_type 'lama' is not supported"),
        (None, "distillation needs a teacher"),
    ],
)
def test_unfit_teachers(llamas: tuple[Path, Path], change: dict[str, Any] | None, said: str) -> None:
    header = read_header(llamas[1])
    teacher = None if change is None else replace(header, config={**header.config, **change})
    made, complaints = planned(header, teacher, DistillOptions())
    assert made is None and len(complaints) == 1 and complaints[0][1].startswith(said)


def test_a_quantized_student_is_refused(llamas: tuple[Path, Path]) -> None:
    header = read_header(llamas[1])
    quantized = replace(header, config={**header.config, "quantization_config": {"quant_method": "bitsandbytes"}})
    made, said = planned(quantized, header, DistillOptions())
    assert made is None and said == [("", "the model is already quantized; distil before quantizing")]


def test_the_plan_is_what_is_written(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = llamas
    made, _ = planned(read_header(student), read_header(teacher), DistillOptions())
    assert made is not None
    distil(student, teacher, tmp_path / "out", max_steps=1)
    written = read_header(tmp_path / "out")
    assert written.tensors == made.after.tensors
    assert made.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert made.parameters == sum(p.numel() for p in model.parameters())


def test_memory_of_ten_billion_parameters() -> None:
    """16 bytes a trained parameter dominate; no weight is read for the estimate."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2}
    config = {"model_type": "llama", "vocab_size": 151552, "intermediate_size": 13696, **sizes}
    header = Header(config=config, tensors={}, locations={})
    shapes = family_of(header).shapes(header)
    header = header.planned(config, (TensorSpec(name, "BF16", shape) for name, shape in shapes.items()))
    made, said = planned(header, header, DistillOptions())
    assert made is not None, said
    assert 16 * made.parameters < made.memory < 24 * made.parameters
    assert any("computed twice" in note for note in made.notes)


def test_order_of_training() -> None:
    ids = np.arange(10)[:, None].repeat(4, axis=1)
    first = training_order(ids, DistillOptions(batch=4), seed=3)
    assert first.shape == (12, 4) and first[:10, 0].tolist() == list(range(10))
    longer = training_order(ids, DistillOptions(batch=4, epochs=3.0), seed=3)
    assert longer.shape == (32, 4)
    assert sorted(longer[10:20, 0]) == sorted(longer[20:30, 0]) == list(range(10))
    assert longer[10:20, 0].tolist() != longer[20:30, 0].tolist()
    assert len(training_order(ids, DistillOptions(batch=4, epochs=3.0, max_steps=2), seed=3)) == 8
    assert len(training_order(ids, DistillOptions(batch=16, epochs=0.5), seed=3)) == 16


def test_learning_rate_rises_and_falls_and_is_never_zero() -> None:
    factors = [schedule(20, 4)(step) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True) and 0 < factors[-1] < 0.02
    assert schedule(1, 0)(0) == 1.0


def test_precision_follows_the_processor(tmp_path: Path) -> None:
    flags = tmp_path / "cpuinfo"
    flags.write_text("model name : x amx_bf16\nflags\t\t: fpu avx2\n")
    assert cpu_precision(flags) == Precision(
        False, "float32, because the processor has neither amx_bf16 nor avx512_bf16"
    )
    flags.write_text("flags\t\t: fpu avx512_bf16\n")
    assert cpu_precision(flags) == Precision(True, "bfloat16, because the processor has avx512_bf16")
    assert not cpu_precision(tmp_path / "none").native


@pytest.mark.parametrize("key", ["epochs", "learning_rate", "weight_decay", "max_grad_norm", "temperature"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_without_an_end_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        DistillOptions(**{key: value})
