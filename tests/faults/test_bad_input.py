"""Bad input, through the command line: one clear line, the right exit code, and OUT absent."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.cli import main
from compress.errors import UserError
from tests import tiny

Breaker = Callable[[Path], None]


def edit_config(change: Callable[[dict[str, Any]], None] | None = None, **changes: object) -> Breaker:
    """Change config.json: a key that becomes None goes."""

    def apply(model: Path) -> None:
        path = model / "config.json"
        config = json.loads(path.read_text()) | changes
        if change is not None:
            change(config)
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Breaker:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def truncate(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def remove(pattern: str) -> Breaker:
    def apply(model: Path) -> None:
        found = sorted(model.glob(pattern))
        assert found
        for path in found:
            path.unlink()

    return apply


def leave_the_folder(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    name = next(iter(value["weight_map"]))
    value["weight_map"][name] = "../../etc/passwd"
    index.write_text(json.dumps(value))


def only_pickles(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def poison(name: str, value: float) -> Breaker:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return edit_weights(change)


def drop(name: str) -> Breaker:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return edit_weights(change)


def huge_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


DOWN = "model.layers.1.mlp.down_proj.weight"
# name -> (what is done to a good model, how many bytes a shard has, what the line must say)
MODELS: dict[str, tuple[Breaker, str, list[str]]] = {
    "truncated": (truncate, "5GB", ["model.safetensors", "truncated"]),
    "truncated shard": (truncate, "100KB", ["model-00001", "truncated"]),
    "missing shard": (remove("model-00002*"), "100KB", ["model-00002", "missing shard"]),
    "path outside": (leave_the_folder, "100KB", ["index.json", "outside the folder"]),
    "no tokenizer": (remove("tokenizer*"), "5GB", ["no tokenizer"]),
    "no config": (remove("config.json"), "5GB", ["config.json", "not found"]),
    "unknown family": (edit_config(model_type="llamma"), "5GB", ["llamma", "did you mean 'llama'"]),
    "no family": (edit_config(model_type=None), "5GB", ["config.json", "model_type"]),
    "other shapes": (edit_config(intermediate_size=112), "5GB", ["config.json implies", "112"]),
    "more layers": (edit_config(num_hidden_layers=4), "5GB", ["model.layers.3", "missing"]),
    "fewer layers": (edit_config(num_hidden_layers=2), "5GB", ["model.layers.2", "no place"]),
    "heads not divisible": (edit_config(num_key_value_heads=3), "5GB", ["8", "3 KV heads"]),
    "size is text": (edit_config(hidden_size="64"), "5GB", ["hidden_size", "whole number"]),
    "tensor missing": (drop(DOWN), "5GB", [DOWN, "missing"]),
    "NaN": (poison(DOWN, float("nan")), "5GB", [DOWN, "NaN"]),
    "infinite": (poison("model.embed_tokens.weight", float("inf")), "5GB", ["model.embed_tokens.weight", "infinite"]),
    "pickle only": (only_pickles, "5GB", ["pytorch_model.bin", "not read"]),
    "huge header": (huge_header, "5GB", ["model.safetensors", "truncated or not safetensors"]),
    "quantized": (edit_config(quantization_config={"quant_method": "gptq"}), "5GB", ["gptq"]),
}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], out: Path, says: list[str], code: int = 2) -> str:
    """Run; the exit code, one error line with every word of `says`, no traceback, no OUT, nothing half-written."""
    before = sorted(p.name for p in out.parent.iterdir())
    capsys.readouterr()
    assert main(arguments) == code
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed.err
    assert "Traceback" not in printed.err
    for word in says:
        assert word in errors[0], errors[0]
    assert not out.exists()
    assert sorted(p.name for p in out.parent.iterdir()) == before
    return errors[0]


@pytest.mark.parametrize("fault", MODELS)
def test_broken_models_are_refused(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaker, shard, says = MODELS[fault]
    model = tiny.llama(tmp_path / "model", shard=shard)
    breaker(model)
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--samples", "4", "--length", "64", "-q"]
    refused(capsys, arguments, out, says)


PRUNE = {
    "nothing to do": ([], ["nothing to prune"]),
    "share 0": (["--ratio", "0"], ["--ratio", "above 0"]),
    "share 1": (["--ffn", "1"], ["--ffn", "below 1"]),
    "share is text": (["--ratio", "lots"], ["--ratio", "lots"]),
    "both kinds": (["--ratio", "0.2", "--keep-ffn", "64"], ["--keep-ffn", "exclude"]),
    "ratio and ffn": (["--ratio", "0.2", "--ffn", "0.3"], ["--ffn", "exclude"]),
    "too many kept": (["--keep-ffn", "97"], ["--keep-ffn", "97", "96"]),
    "uneven heads": (["--keep-heads", "5"], ["--keep-heads", "multiple of 2"]),
    "target and share": (["--params", "100K", "--ratio", "0.2"], ["--params", "exclude"]),
    "target is text": (["--bytes", "9Q"], ["--bytes", "9Q", "11GiB"]),
    "target out of reach": (["--params", "1K"], ["--params", "cannot be reached"]),
    "heads round to none": (["--heads", "0.05"], ["--heads", "0.2500, 0.5000, 0.7500"]),
    "rounds to nothing": (["--ratio", "0.01"], ["--ratio", "removes nothing"]),
    "leaves nothing": (["--ffn", "0.99"], ["--ffn", "0.99 cannot be reached", "0.9167"]),
    "heads remove more": (["--ratio", "0.01", "--heads", "0.5"], ["--ratio", "heads alone remove"]),
    "criterion": (["--ratio", "0.3", "--criterion", "wnada"], ["--criterion", "did you mean 'wanda'"]),
    "unknown option": (["--ratoi", "0.3"], ["--ratoi", "--ratio"]),
    "no data": (["--ratio", "0.3", "--data", "none.txt"], ["none.txt"]),
    "unknown data": (["--ratio", "0.3", "--data", "bultin"], ["bultin", "builtin"]),
    "too many samples": (["--ratio", "0.3", "--samples", "100000"], ["100000"]),
}


@pytest.mark.parametrize("fault", PRUNE)
def test_prune_refuses(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, says = PRUNE[fault]
    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    refused(capsys, ["prune", str(model), "-o", str(out), *options, "-q"], out, says)


def test_empty_and_short_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("A short text.")
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"texte": "bad"}\n')
    out = tmp_path / "out"
    for name, says in (("empty.txt", "empty"), ("short.txt", "tokens"), ("broken.jsonl", "line 2")):
        arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--data", str(tmp_path / name), "-q"]
        refused(capsys, arguments, out, [name, says])


def test_all_of_a_text_may_be_too_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many there are is known when the step reads it: as a plan says it of windows that are counted, before the
    layers that stay are chosen."""
    model, text = tiny.llama(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("ninety bytes " * 7)
    data, one = {"source": str(text), "samples": None, "length": 32}, compress.Machine(1)
    line = "64 calibration tokens for a Gram matrix of 96 columns: 0.67 a column"
    with pytest.raises(UserError, match=line):
        compress.prune(model, tmp_path / "out", ffn=0.4, data=data, machine=one)
    with monkeypatch.context() as patched, pytest.raises(UserError, match=line):
        patched.setattr("compress.steps.prune.run.find_depth", lambda *_: pytest.fail("layers were chosen first"))
        compress.prune(model, tmp_path / "out", ffn=0.4, keep_layers=2, layer_criterion="loss", data=data, machine=one)
    short = tmp_path / "short.txt"
    short.write_text("ninety bytes " * 4)
    with pytest.raises(UserError, match="32 calibration tokens for a Gram matrix of 64 columns"):  # o_proj is refitted
        compress.prune(model, tmp_path / "out", keep_kv_heads=1, data=data | {"source": str(short)}, machine=one)
    with pytest.raises(UserError, match=line):
        compress.measure_sensitivity(model, tmp_path / "seen", data=data, machine=one, pictures=False)
    compress.prune(model, tmp_path / "out", ffn=0.4, data=data, machine=one, force=True)
    compress.prune(model, tmp_path / "magnitude", ffn=0.4, data=data, machine=one, criterion="magnitude", refit=False)


def test_windows_longer_than_a_table_of_positions_are_one_line(tmp_path: Path) -> None:
    model = tiny.undescribed("ctrl", tmp_path / "ctrl", dff=96, num_key_value_heads=8, max_position_embeddings=48)
    data = {"samples": 4, "length": 64}
    with pytest.raises(UserError, match="windows of 64 tokens, and its table of positions is shorter"):
        compress.prune(model, tmp_path / "out", ffn=0.3, data=data, machine=compress.Machine(1))


def test_heads_that_nothing_loads_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    biased = tiny.llama(tmp_path / "biased", attention_bias=True)
    says = ["--heads", "6 does not divide 64", "4 and 8", "no biases"]
    refused(capsys, ["prune", str(biased), "-o", str(out), "--heads", "0.25", "-q"], out, says)
    relative = tiny.glm46v_interleaved(tmp_path / "relative")
    arguments = ["prune", str(relative), "-o", str(out), "--heads", "0.5", "--flavour", "native", "-q"]
    refused(capsys, arguments, out, ["--flavour", "portable"])


def test_quantized_models_go_no_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    small = tmp_path / "small"
    assert main(["quantize", str(model), "-o", str(small), "--format", "int8", "-q"]) == 0
    out = tmp_path / "out"
    for arguments in (
        ["prune", str(small), "--ratio", "0.3"],
        ["distill", str(small), "--teacher", str(model)],
        ["quantize", str(small), "--format", "w8a16"],
    ):
        refused(capsys, [*arguments, "-o", str(out), "-q"], out, ["quantized"])


def test_formats_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    refused(capsys, ["quantize", str(model), "-o", str(out), "--format", "it8", "-q"], out, ["it8", "int8"])


def test_fp16_overflow_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model", dtype=torch.bfloat16)
    poison(DOWN, 1e6)(model)
    out = tmp_path / "out"
    for name in ("fp16", "int8"):
        refused(capsys, ["quantize", str(model), "-o", str(out), "--format", name, "-q"], out, [DOWN, "overflow"])


def test_a_teacher_with_another_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tiny.llama(tmp_path / "student")
    teacher = tiny.llama(tmp_path / "teacher", vocab_size=400)
    out = tmp_path / "out"
    arguments = ["distill", str(student), "--teacher", str(teacher), "-o", str(out), "-q"]
    refused(capsys, arguments, out, ["384", "400"])


def test_folders_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    work = ["--format", "bf16", "-q"]
    refused(
        capsys, ["quantize", str(tmp_path / "modle"), "-o", str(tmp_path / "out"), *work], tmp_path / "out", ["modle"]
    )
    inside = model / "out"
    refused(capsys, ["quantize", str(model), "-o", str(inside), *work], inside, ["inside the source"])
    there = tmp_path / "there"
    there.mkdir()
    (there / "theirs").touch()
    assert main(["quantize", str(model), "-o", str(there), *work]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in there.iterdir()] == ["theirs"]


def test_a_gate_that_the_planned_size_fails_ends_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.llama(tmp_path / "model")
    recipe = tmp_path / "strict.yaml"
    recipe.write_text(
        f"model: {model}\nsteps:\n- prune: {{ffn: 0.5}}\nevaluate: never\n"
        "data:\n  calibration: {samples: 4, length: 64}\ngates: {max_bytes: 1KB, max_parameters: 0.01K}\n"
    )
    for command in (["plan", str(recipe)], ["run", str(recipe), "-o", str(tmp_path / "out"), "-q"]):
        assert main(command) == 3
        error = capsys.readouterr().err
        assert "gate max_bytes: the plan gives" in error and "allowed 1,000" in error and "allowed 10" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "strict.yaml"]


def test_a_failed_gate_keeps_the_result_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    recipe = tmp_path / "strict.yaml"
    recipe.write_text(
        f"model: {model}\nsteps:\n- prune: {{ffn: 0.5}}\n"
        "data:\n  calibration: {samples: 4, length: 64}\n  evaluation: {samples: 2, length: 64}\n"
        "gates: {max_kl: 0.000001, min_top1_agreement: 1}\n"
    )
    out = tmp_path / "out"
    assert main(["run", str(recipe), "-o", str(out), "-q"]) == 3
    error = capsys.readouterr().err
    assert "max_kl" in error and "min_top1_agreement" in error and "out.rejected" in error
    assert not out.exists()
    card = (tmp_path / "out.rejected" / "README.md").read_text()
    assert "# model, compressed\n\n**Rejected: " in card and "- gate max_kl: " in card
    assert (tmp_path / "out.rejected" / "receipt.json").exists()
    assert "\nhint: where gates alone are changed, the same command repeats no step" in error
    assert all(path.is_file() for path in (tmp_path / "out.work").iterdir())  # records alone
    assert main(["run", str(recipe), "-o", str(out), "-q", "--discard"]) == 3
    assert "hint" not in capsys.readouterr().err and not (tmp_path / "out.work").exists()


def test_a_failed_self_check_is_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: one matrix is written upside down, which no shape can show."""
    from compress.checkpoint.writer import Writer

    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    put = Writer.put

    def planted(self: Writer, name: str, value: torch.Tensor) -> None:
        put(self, name, value.flip(0) if name.endswith("layers.1.mlp.up_proj.weight") else value)

    monkeypatch.setattr(Writer, "put", planted)
    arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--samples", "4", "--length", "64", "-q"]
    refused(capsys, arguments, out, ["self-check failed", "logits", "differ"], code=1)


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    written = 0
    real = os.pwrite

    def limited(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--samples", "4", "--length", "64", "-q"]
    refused(capsys, arguments, out, ["disk is full"], code=4)


def test_too_little_memory_is_known_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--memory", "1MiB", "-q"]
    refused(capsys, arguments, out, ["memory"], code=4)


def test_nothing_that_is_not_ours_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    work = ["quantize", str(model), "-o", str(out), "--format", "bf16", "-q"]
    (tmp_path / "out.rejected").mkdir()
    (tmp_path / "out.rejected" / "precious").touch()
    refused(capsys, work, out, ["out.rejected", "not a result of ours"])
    (tmp_path / "out.rejected").rename(tmp_path / "out.work")
    for dry in ([], ["--dry-run"]):
        refused(capsys, [*work, *dry], out, ["out.work", "not a work folder of ours"])
    (tmp_path / "out.work").rename(tmp_path / "elsewhere")
    for side in ("out.work", "out.rejected"):
        (tmp_path / side).symlink_to(tmp_path / "elsewhere")
        for dry in ([], ["--dry-run"]):
            refused(capsys, [*work, *dry], out, [side, "a link"])
        (tmp_path / side).unlink()
    for dry in ([], ["--dry-run"]):
        assert main(["quantize", str(model), "-o", str(model / "config.json" / "x"), "--format", "bf16", *dry]) == 2
        assert "cannot be written" in capsys.readouterr().err
    out.symlink_to(tmp_path / "elsewhere")
    assert main([*work, "--overwrite"]) == 2
    assert "a link" in capsys.readouterr().err
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_a_source_in_our_side_folders_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--samples", "4", "--length", "64", "-q"]
    assert main([*arguments, "--keep-work"]) == 0
    kept = tmp_path / "out.work" / "1-prune"
    kept.mkdir()
    for path in out.iterdir():
        if path.is_file():
            (kept / path.name).write_bytes(path.read_bytes())
    assert main(["quantize", str(kept), "-o", str(out), "--format", "int8", "--overwrite", "-q"]) == 2
    assert "inside the source" in capsys.readouterr().err
    assert (kept / "model.safetensors").exists() and (out / "model.safetensors").exists()


def test_two_runs_into_one_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from compress.output import locked

    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    work = ["quantize", str(model), "-o", str(out), "--format", "bf16", "-q"]
    with locked(out):
        assert main(work) == 2
        assert "another run" in capsys.readouterr().err
    assert main(work) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_an_interrupt_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    model = tiny.llama(tmp_path / "model")
    out = tmp_path / "out"
    work = ["quantize", str(model), "-o", str(out), "--format", "bf16", "-q"]
    assert main(work) == 0
    before = (out / "measured.json").read_bytes()
    real = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if Path(target) == out and "work" in str(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    assert main([*work, "--overwrite"]) == 130
    assert (out / "measured.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "out.work"]
    monkeypatch.setattr(os, "rename", real)
    assert main([*work, "--overwrite"]) == 0  # goes on: nothing is done twice
    assert (out / "measured.json").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


CONFIGS = {
    "no architectures": (edit_config(architectures=None), ["architectures", "LlamaForCausalLM"]),
    "odd architectures": (edit_config(architectures={"a": 1}), ["architectures", "LlamaForCausalLM"]),
    "base class": (edit_config(architectures=["LlamaModel"]), ["architectures", "LlamaForCausalLM"]),
    "unknown activation": (edit_config(hidden_act="nope"), ["config.json", "nope"]),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_odd_configs(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaker, says = CONFIGS[fault]
    model = tiny.llama(tmp_path / "model")
    breaker(model)
    out = tmp_path / "out"
    arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--samples", "4", "--length", "64", "-q"]
    refused(capsys, arguments, out, says)


def test_a_tie_that_stock_does_not_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    edit_config(tie_word_embeddings=True)(model)
    out = tmp_path / "out"
    arguments = ["prune", str(model), "-o", str(out), "--ratio", "0.3", "--samples", "4", "--length", "64", "-q"]
    refused(capsys, arguments, out, ["lm_head", "differ"])


def test_a_result_that_no_gate_rejected_is_not_replaced_by_one_that_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.llama(tmp_path / "model")
    good = tmp_path / "out.rejected"
    assert main(["quantize", str(model), "-o", str(good), "--format", "bf16", "-q"]) == 0
    before = sorted(good.iterdir())
    work = ["quantize", str(model), "-o", str(tmp_path / "out"), "--format", "bf16", "-q"]
    refused(capsys, work, tmp_path / "out", ["out.rejected", "no gate has rejected it"])
    assert sorted(good.iterdir()) == before


def test_a_text_that_is_not_there_hides_no_other_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama(tmp_path / "model")
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(
        f"model: {model}\nsteps:\n- prune: {{ffn: 0.5}}\n"
        "data:\n  calibration: {source: nope.txt, samples: null}\n  evaluation: {source: neither.txt}\n"
    )
    assert main(["plan", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "2 problems" in said and "data.calibration: nope.txt" in said and "data.evaluation: neither.txt" in said
