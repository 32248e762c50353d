"""On a GPU: everything meets on the device, the result is the one of the CPU, and what cannot run there says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from safetensors.torch import load_file

from tests import sight, tiny

TEXT = ["--samples", "4", "--length", "32", "--threads", "1"]
CUT = ["--ratio", "0.2", "--heads", "0.5"]
AMPLE = 2**40
Main = Callable[..., tuple[int, str, str]]
OnGpu = Callable[..., tuple[int, str, int]]


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[OnGpu]:
    """Runs the command line where there is one: exit code, what was said, matrix products taken on the GPU."""
    command, environment = [sys.executable, "-m", "tests.fake_gpu"], os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment) as process:
        asked, told = process.stdin, process.stdout
        assert asked and told

        def run(*arguments: str, free: int = AMPLE, device: str = "cuda") -> tuple[int, str, int]:
            asked.write(json.dumps([free, [*arguments, "-q", "--device", device]]) + "\n")
            asked.flush()
            code, out, error, products = json.loads(told.readline())
            return code, out + error, products

        yield run
        asked.close()


@pytest.mark.parametrize(
    ("family", "criterion"), [("llama", "obs"), ("glm4v", "wanda"), ("llama", "activation"), ("glm4v", "taylor")]
)
def test_prune(family: str, criterion: str, tmp_path: Path, main: Main, on_gpu: OnGpu) -> None:
    model = getattr(tiny, family)(tmp_path / "model")
    joint = ["--joint-refit", "2", "--error-propagation", "0.3"] if criterion == "wanda" else []
    work = ["prune", str(model), *CUT, *TEXT, "--criterion", criterion, *joint, "-o"]
    code, said, products = on_gpu(*work, str(tmp_path / "gpu"), device="auto")
    assert code == 0, said
    assert products > 20
    assert main(*work, str(tmp_path / "cpu"), "-q", "--device", "cpu")[0] == 0
    gpu, cpu = (json.loads((tmp_path / name / "receipt.json").read_text()) for name in ("gpu", "cpu"))
    assert (gpu["device"], cpu["device"]) == ("cuda (Fake GPU)", "cpu")
    measured = json.loads((tmp_path / "gpu" / "measured.json").read_text())
    assert measured["steps"][0]["device_memory_peak"] == 1
    scores = [
        load_file(tmp_path / name / "sensitivity" / "1-prune" / "importance.safetensors") for name in ("gpu", "cpu")
    ]
    assert all(scores[0][key].equal(value) for key, value in scores[1].items() if key.endswith(".keep"))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu")]
    # attention is plain products there and a fused kernel here
    assert all(value.allclose(weights[0][key], rtol=1e-3, atol=1e-4) for key, value in weights[1].items())


@pytest.mark.parametrize("criterion", ["influence", "loss"])
def test_whole_layers_and_kv_heads(criterion: str, tmp_path: Path, main: Main, on_gpu: OnGpu) -> None:
    model = tiny.glm4v(tmp_path / "model", num_hidden_layers=3)
    cut = ["--keep-layers", "2", "--layer-criterion", criterion, "--keep-kv-heads", "1", "--keep-heads", "6"]
    work = ["prune", str(model), *cut, "--samples", "6", "--length", "32", "--threads", "1", "-o"]
    code, said, products = on_gpu(*work, str(tmp_path / "gpu"))
    assert code == 0 and products > 20, said
    assert main(*work, str(tmp_path / "cpu"), "-q", "--device", "cpu")[0] == 0
    steps = [json.loads((tmp_path / name / "receipt.json").read_text())["steps"][0] for name in ("gpu", "cpu")]
    assert steps[0]["layers"]["gone"] == steps[1]["layers"]["gone"] and len(steps[0]["layers"]["gone"]) == 1
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu")]
    # not attention: the common keys and values may be turned another way and compute the same
    names = [name for name in weights[1] if "mlp" in name]
    assert names and all(weights[0][name].allclose(weights[1][name], rtol=1e-3, atol=1e-4) for name in names)


def test_the_vision_tower(tmp_path: Path, main: Main, on_gpu: OnGpu) -> None:
    model, chats = sight.can_see(tiny.glm4v(tmp_path / "model")), sight.chats(tmp_path / "data", count=40)
    work = ["prune", str(model), "--keep-vision-layers", "1", "--keep-vision-ffn", "24", "--criterion", "obs"]
    work += ["--data", str(chats), "--samples", "20", "--length", "64", "--threads", "1", "--held-out", "0.3", "-o"]
    code, said, products = on_gpu(*work, str(tmp_path / "gpu"))
    assert code == 0 and products > 20, said
    assert main(*work, str(tmp_path / "cpu"), "-q", "--device", "cpu")[0] == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu")]
    assert all(value.allclose(weights[0][key], rtol=1e-3, atol=1e-4) for key, value in weights[1].items())


def test_images(tmp_path: Path, main: Main, on_gpu: OnGpu) -> None:
    model, chats = sight.can_see(tiny.glm4v(tmp_path / "model")), sight.chats(tmp_path / "data")
    work = ["prune", str(model), *CUT, "--data", str(chats), "--samples", "5", "--length", "64", "--threads", "1"]
    work += ["--token-shares", "image=1,prompt=1,answer=2", "--token-weights", "norm", "-o"]
    code, said, products = on_gpu(*work, str(tmp_path / "gpu"))
    assert code == 0 and products > 20, said
    assert main(*work, str(tmp_path / "cpu"), "-q", "--device", "cpu")[0] == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu")]
    assert all(value.allclose(weights[0][key], rtol=1e-3, atol=1e-4) for key, value in weights[1].items())


def test_sensitivity(tmp_path: Path, main: Main, on_gpu: OnGpu) -> None:
    model = tiny.llama(tmp_path / "model")
    work = ["sensitivity", str(model), *TEXT, "--criterion", "obs", "--no-pictures", "-o"]
    code, said, products = on_gpu(*work, str(tmp_path / "gpu"))
    assert code == 0, said
    assert products > 20
    assert main(*work, str(tmp_path / "cpu"), "-q", "--device", "cpu")[0] == 0
    gpu, cpu = (load_file(tmp_path / name / "sensitivity.safetensors") for name in ("gpu", "cpu"))
    # attention is plain products there and a fused kernel here
    assert all(value.allclose(gpu[key], rtol=1e-2, atol=1e-6) for key, value in cpu.items() if "order" not in key)


@pytest.mark.parametrize("format", ["w8a16", "w8a8"])
def test_evaluate(format: str, tmp_path: Path, main: Main, on_gpu: OnGpu) -> None:
    model = tiny.llama(tmp_path / "model")
    assert main("quantize", str(model), "-o", str(tmp_path / "small"), "--format", format, "-q")[0] == 0
    work = ["evaluate", str(tmp_path / "small"), "--reference", str(model), *TEXT, "--json"]
    code, said, products = on_gpu(*work)
    assert code == 0, said
    assert products > 20
    _, here, _ = main(*work, "-q", "--device", "cpu")
    found, expected = json.loads(said), json.loads(here)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-2)  # rounded inputs magnify
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.1, abs=1e-5)


def test_what_cannot_be(tmp_path: Path, main: Main, on_gpu: OnGpu) -> None:
    model = tiny.llama(tmp_path / "model")
    code, said, products = on_gpu("prune", str(model), *CUT, *TEXT, "-o", str(tmp_path / "out"), free=1000)
    assert (code, products) == (4, 0)
    assert "on the GPU, 1000 B are free" in said and "--device cpu runs without it" in said
    code, _, said = main("evaluate", str(model), *TEXT, "--device", "cuda")
    assert code == 4 and said.startswith("error: --device cuda: torch ") and said.count("\n") == 2
    code, _, said = main("evaluate", str(model), *TEXT, "--device", "cdua")
    assert code == 2 and "did you mean 'cuda'?" in said
    assert main("evaluate", str(model), *TEXT, "--device", "auto", "-q")[0] == 0  # there is none: the CPU


def test_a_full_gpu_is_one_line(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from compress.stream.forward import Stream

    def full(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    model = tiny.llama(tmp_path / "model")
    monkeypatch.setattr(Stream, "advance", full)
    for work in (["evaluate", str(model)], ["prune", str(model), *CUT, "-o", str(tmp_path / "out")]):
        code, _, said = main(*work, *TEXT)
        assert code == 4 and "\nerror: the GPU is full: CUDA out of memory\nhint: " in "\n" + said, said
        assert not (tmp_path / "out").exists()
