"""Activations that are no numbers, and inputs that are all zero: the first end in one line that names the layer, the
second are no fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.cli import main
from compress.criteria import CRITERIA
from tests import tiny
from tests.stock import load, logits

TEXT = ["--samples", "6", "--length", "64", "--threads", "1"]
CUT = ["--ffn", "0.3", "--heads", "0.5"]
MERGED = ["--keep-kv-heads", "1"]
FFN = "model.layers.1.mlp.{}_proj.weight"


def scaled(model: Path, folder: Path, factors: dict[str, float]) -> Path:
    """The pico llama with some tensors times a factor."""
    for file in model.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    for name, factor in factors.items():
        tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def dead(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In layer 0 neuron 17 never fires, in layer 1 none does, in layer 2 the heads give nothing."""
    gates = {FFN.format(name): 0.0 for name in ("gate", "up")}
    folder = scaled(
        model, tmp_path_factory.mktemp("dead") / "dead", gates | {"model.layers.2.self_attn.v_proj.weight": 0.0}
    )
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"][17] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dead_units_are_cut_by_every_criterion(
    criterion: str, dead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["prune", str(dead), "-o", str(out), "--criterion", criterion, *CUT, *TEXT]) == 0
    said = capsys.readouterr().err
    for name in ("layer 1 ffn", "layer 2 heads"):
        assert f"{name}: its inputs are all zero on the calibration text: nothing to refit by" in said
    assert said.count("all zero") == 2
    before, after = load_file(dead / "model.safetensors"), load_file(out / "model.safetensors")
    for name in (
        FFN.format("down"),
        "model.layers.2.self_attn.o_proj.weight",
    ):  # its columns as they were
        columns = {tuple(column.tolist()) for column in before[name].T}
        assert {tuple(column.tolist()) for column in after[name].T} < columns
    gates = after["model.layers.0.mlp.gate_proj.weight"]
    assert len(gates) == 64
    if criterion not in ("random", "magnitude", "tp-magnitude"):  # which see its column of down_proj or nothing
        assert bool(gates.any(dim=1).all())
    assert bool(torch.isfinite(logits(load(out), {"input_ids": torch.arange(40)[None]})).all())


@pytest.mark.parametrize(
    "how",
    [
        ["prune", *CUT, "--criterion", "obs", "--no-refit"],
        ["prune", *CUT, "--held-out", "0.5"],
        ["prune", *CUT, "--token-weights", "norm"],
        ["prune", *MERGED],
        ["prune", *MERGED, "--kv-merge", "mean"],
        ["prune", "--keep-layers", "2", "--layer-criterion", "loss", "--ffn", "0.3"],
        ["sensitivity", "--no-pictures", "--criterion", "obs"],
    ],
    ids=" ".join,
)
def test_dead_units_end_no_run(how: list[str], dead: Path, tmp_path: Path) -> None:
    assert main([how[0], str(dead), "-o", str(tmp_path / "out"), *how[1:], *TEXT, "-q"]) == 0


# name -> what overflows: inside a module, at a layer's output, in its attention, behind the last layer
FAULTS: dict[str, dict[str, float]] = {
    "inside": {FFN.format("up"): 1e25, FFN.format("down"): 1e-25},
    "output": {FFN.format("gate"): 1e18, FFN.format("up"): 1e18, FFN.format("down"): 1e18},
    "attention": {"model.layers.1.self_attn.v_proj.weight": 1e38, "model.layers.1.self_attn.o_proj.weight": 1e3},
    "logits": {"lm_head.weight": 1e36, "model.norm.weight": 1e5},
}
OUTPUT = "layer 1: its output is NaN or infinite: activations overflow"


@pytest.mark.parametrize(
    ("fault", "how", "line"),
    [
        ("inside", [*CUT, "--criterion", "obs"], "layer 1 ffn: activations are NaN or infinite"),
        ("inside", [*CUT, "--criterion", "taylor"], "layer 1 ffn: activations are NaN or infinite"),
        ("inside", [*CUT, "--criterion", "random"], "layer 1 ffn: activations are NaN or infinite"),
        ("output", [*CUT, "--criterion", "fisher"], OUTPUT),
        ("output", [*CUT, "--criterion", "tp-taylor"], OUTPUT),
        ("output", [*CUT, "--criterion", "random", "--no-refit"], OUTPUT),
        ("output", MERGED, OUTPUT),
        ("output", [*MERGED, "--kv-merge", "drop"], OUTPUT),
        ("attention", [*CUT, "--criterion", "magnitude"], "layer 1 heads: activations are NaN or infinite"),
        ("attention", MERGED, "layer 1: KV heads cannot be aligned: keys or values overflow"),
        (
            "attention",
            [*MERGED, "--kv-merge", "mean"],
            "layer 1 self_attn.o_proj: activations are NaN or infinite",
        ),
        ("logits", CUT, "what is left of the model gives logits that are NaN or infinite: they overflow"),
        (
            "logits",
            [*CUT, "--criterion", "taylor"],
            "the gradient of the loss is NaN or infinite: the model's logits overflow",
        ),
        (
            "logits",
            ["--keep-layers", "2", "--layer-criterion", "loss"],
            "the model's loss is NaN or infinite: its logits overflow",
        ),
    ],
)
def test_what_is_no_number_is_one_line(
    fault: str, how: list[str], line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = scaled(model, tmp_path / "model", FAULTS[fault]), tmp_path / "out"
    assert main(["prune", str(broken), "-o", str(out), *how, *TEXT, "-q"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not out.exists()


def test_a_refit_that_leaves_the_range_of_float16_names_the_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dense matrix fits, and so does what it gives; what is wanted of the columns that stay does not fit."""
    source, out = tiny.llama(tmp_path / "source", dtype=torch.float16), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    for name, factor in (("gate", 1e-3), ("up", 1e-3), ("down", 2e5)):
        wide = tensors[FFN.format(name)].float() * factor
        tensors[FFN.format(name)] = wide.clamp(-65000, 65000).half()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    line = ["prune", str(source), "-o", str(out), "--keep-ffn", "40", "--damping", "1e-6", "--threads", "1", "-q"]
    assert main([*line, "--samples", "12", "--length", "64"]) == 2
    said = f"error: tensor '{FFN.format('down')}': what the refit gives it overflows float16 (ends at 65504)\n"
    assert capsys.readouterr().err.startswith(said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("inside", "layer 1 ffn: activations are NaN or infinite"),
        ("output", OUTPUT),
        ("logits", "the gradient of the loss is NaN or infinite: the model's logits overflow"),
    ],
)
def test_an_analysis_of_what_is_no_number_is_one_line(
    fault: str, line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = scaled(model, tmp_path / "model", FAULTS[fault]), tmp_path / "out"
    assert main(["sensitivity", str(broken), "-o", str(out), "--no-pictures", *TEXT, "-q"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not out.exists()


def test_an_ffn_that_gives_zeros_goes_through_the_joint_refit(dead: Path, tmp_path: Path) -> None:
    assert main(["prune", str(dead), "-o", str(tmp_path / "out"), "--joint-refit", "2", *CUT, *TEXT, "-q"]) == 0


def test_logits_that_overflow_are_the_models_when_it_is_quantized(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = scaled(model, tmp_path / "wild", {"model.norm.weight": 1e37, "lm_head.weight": 1e3})
    assert main(["quantize", str(wild), "-o", str(tmp_path / "out"), "--format", "w8a16", "-q"]) == 2
    assert "logits are NaN or infinite" in capsys.readouterr().err and not (tmp_path / "out").exists()
