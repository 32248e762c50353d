"""Criteria through the front door: the costs are those of the stock model's own activations; no more is gathered than
is asked for; what is drawn depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.ledger import Ledger
from compress.criteria import CRITERIA
from compress.data import DataSpec, windows
from compress.steps.prune import coupled
from compress.stream import GRADIENTS, WHOLE, Statistic, backward, forward
from compress.stream.statistics import KINDS
from tests import brute, tiny
from tests.brute import statistics
from tests.stock import load

TEXT = ["--samples", "5", "--length", "64"]
CUT = ["--ffn", "0.3", "--heads", "0.5"]
READERS = {"heads": ("self_attn.o_proj", 8), "ffn": ("mlp.down_proj", 1)}  # of tiny.llama: columns of a unit
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("criteria") / "model")


def prune(main: Main, model: Path, out: Path, criterion: str, *more: str) -> dict[str, torch.Tensor]:
    """The scores that the command leaves: layers.N.GROUP.{cost,order,keep}."""
    line = ["prune", str(model), "-o", str(out), "--criterion", criterion, *CUT, *TEXT, "--threads", "1", "-q", *more]
    code, _, said = main(*line)
    assert code == 0, said
    return scores(out)


def scores(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")


def stock_inputs(model: Path) -> dict[str, torch.Tensor]:
    """What the readers of layer 0 see in the stock model, by group: [windows, L, n]."""
    tokens = windows(DataSpec(source="builtin", samples=5, length=64), "calibration", model, 0)
    stock, seen = load(model), dict[str, torch.Tensor]()
    for group, (name, _) in READERS.items():
        stock.model.layers[0].get_submodule(name).register_forward_pre_hook(
            lambda module, args, group=group: seen.update({group: args[0].detach()})
        )
    with torch.no_grad():
        stock(torch.from_numpy(tokens.ids))
    return seen


@pytest.mark.parametrize("refit", ["--refit", "--no-refit"])
@pytest.mark.parametrize("criterion", ["wanda", "flap", "activation"])
def test_costs_are_those_of_the_stock_models_activations(
    criterion: str, refit: str, model: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "BATCH_TOKENS", 128)  # two windows a batch, the last one alone
    found = prune(main, model, tmp_path / "out", criterion, refit)
    layer = load(model).model.layers[0]
    for group, inputs in stock_inputs(model).items():
        name, width = READERS[group]
        energy = layer.get_submodule(name).weight.detach().square().sum(0)
        seen = statistics(inputs, width)
        expected = {
            "wanda": (energy * seen["square"]).view(-1, width).sum(1),
            "flap": (energy * seen["variance"]).view(-1, width).sum(1),
            "activation": seen["activity"],
        }
        torch.testing.assert_close(found[f"layers.0.{group}.cost"], expected[criterion], rtol=1e-4, atol=0)


@pytest.mark.parametrize("refit", ["--refit", "--no-refit"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_costs_are_those_of_the_dense_models_gradients(
    criterion: Statistic, refit: str, model: Path, tmp_path: Path, main: Main
) -> None:
    """Of every layer, though those before it were cut by then, and on the first windows alone."""
    found = prune(main, model, tmp_path / "out", criterion, refit, "--gradient-samples", "3")
    tokens = windows(DataSpec(source="builtin", samples=5, length=64), "calibration", model, 0)
    expected = brute.gradients(model, torch.from_numpy(tokens.ids)[:3])[0]
    assert len(expected) == 3
    for index, layer in enumerate(expected):
        for group, kinds in layer.items():
            value, floor = kinds[criterion], 1e-4 * float(kinds[criterion].mean())
            torch.testing.assert_close(found[f"layers.{index}.{group}.cost"], value, rtol=1e-4, atol=floor)


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4", "glm46v_interleaved"])
@pytest.mark.parametrize(("theirs", "ours"), [("tp-magnitude", "magnitude"), ("tp-taylor", "taylor")])
def test_torch_pruning_ranks_as_the_same_formula_does(
    theirs: str, ours: str, family: str, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its costs are ours (squared, of magnitude) times a number that the layer's units share, and they rank alike: none
    of these families has a bias in its groups, but glm46v, whose heads it does not take."""
    model = getattr(tiny, family)(tmp_path / "model")
    cut = ["--ffn", "0.3"] if family.startswith("glm46v") else CUT
    monkeypatch.setattr("tests.invariants.test_criteria.CUT", cut)
    found, expected = (prune(main, model, tmp_path / name, name, "--no-refit") for name in (theirs, ours))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith(".cost"):
            ratio = found[key] / (value.square() if ours == "magnitude" else value)
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    ("family", "cut", "why"),
    [
        ("phi3", ["--keep-heads", "6"], "heads whose q, k and v are one matrix"),
        ("glm4v", ["--keep-heads", "6"], "heads with rotary embeddings of several axes"),
        ("glm4v_native", ["--keep-ffn", "64"], "stock transformers does not load it"),
        ("llama_mha", ["--keep-kv-heads", "4", "--kv-merge", "drop"], "heads with a KV head each"),
    ],
)
def test_where_torch_prunings_graph_is_wrong_the_plan_says_so(
    family: str, cut: list[str], why: str, tmp_path: Path, main: Main
) -> None:
    name, mha, _ = family.partition("_mha")
    model = getattr(tiny, name)(tmp_path / "model", **({"num_key_value_heads": 8} if mha else {}))
    code, _, said = main("prune", str(model), "-o", str(tmp_path / "out"), "--criterion", "tp-magnitude", *cut, *TEXT)
    assert code == 2 and f"this {name}: {why}" in said and not (tmp_path / "out").exists(), said


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_graph_of_torch_pruning_that_has_no_end_is_left(family: str, tmp_path: Path, main: Main) -> None:
    """Where two query heads share a KV head."""
    model = getattr(tiny, family)(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    line = ["prune", str(model), "--criterion", "tp-magnitude", *TEXT, "--threads", "1", "-q"]
    code, _, said = main(*line, "-o", str(tmp_path / "out"), "--heads", "0.5")
    assert code == 2 and "layer 0 heads: Torch-Pruning finds no end in the graph of this" in said
    assert not (tmp_path / "out").exists()
    assert main(*line, "-o", str(tmp_path / "out"), "--ffn", "0.3")[0] == 0


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_torch_pruning_looks_at_layers_that_differ(family: str, tmp_path: Path, main: Main) -> None:
    line = ["--threads", "1", "-q", *TEXT]
    model, cut = getattr(tiny, family)(tmp_path / "model"), tmp_path / "cut"
    assert main("prune", str(model), "-o", str(cut), "--pin", "layers.1.mlp=40", *line)[0] == 0
    pins = ["--pin", "layers.0.self_attn=4", "--pin", "layers.1.mlp=32"]
    code, _, said = main("prune", str(cut), "-o", str(tmp_path / "out"), "--criterion", "tp-magnitude", *pins, *line)
    assert code == 0, said


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_more_is_gathered_than_is_asked_for(
    criterion: str, model: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.receipt import load_receipt

    made: set[str] = set()
    for kind, real in list(KINDS.items()):

        def counted(*arguments, kind=kind, real=real):  # type: ignore[no-untyped-def]
            made.add(kind)
            return real(*arguments)

        monkeypatch.setitem(KINDS, kind, counted)
    prune(main, model, tmp_path / "out", criterion, "--no-refit")
    assert made == CRITERIA[criterion].needs - GRADIENTS - WHOLE
    layers = load_receipt(tmp_path / "out")["steps"][0]["relative_output_error"]
    known = {said["error"] is not None for layer in layers for said in layer.values()}
    assert known == {"gram" in made}  # the error takes a Gram matrix


@pytest.mark.usefixtures("one_thread")
def test_random_is_the_seeds_and_of_nothing_else(model: Path, tmp_path: Path, main: Main) -> None:
    costs = {key: value for key, value in prune(main, model, tmp_path / "a", "random").items() if "cost" in key}
    assert len({tuple(value.tolist()) for value in costs.values()}) == len(costs) == 6  # no layer as another
    others = {"text": ["--samples", "3"], "threads": ["--threads", "2"], "refit": ["--no-refit"]}
    for name, more in others.items():
        again = prune(main, model, tmp_path / name, "random", *more)
        assert all(torch.equal(again[key], value) for key, value in costs.items()), name
    alone = ["prune", str(model), "-o", str(tmp_path / "alone"), "--criterion", "random", "--ffn", "0.3", "-q"]
    assert main(*alone, *TEXT, "--threads", "1")[0] == 0
    found = scores(tmp_path / "alone")
    assert all(torch.equal(found[key], value) for key, value in costs.items() if "ffn" in key)
    other = prune(main, model, tmp_path / "seed", "random", "--seed", "1")
    assert not any(torch.equal(other[key], value) for key, value in costs.items())


# of those that need a backward pass, the first state is the one after it
@pytest.mark.parametrize(
    ("criterion", "stop", "where"),
    [
        ("flap", 2, "2 layers"),
        ("activation", 2, "2 layers"),
        ("random", 2, "2 layers"),
        ("taylor", 1, "what the criterion takes of the dense model"),
        ("tp-taylor", 2, "1 layers"),
        ("fisher", 3, "2 layers"),
    ],
)
def test_resumed_it_ends_with_the_same_bytes(
    criterion: str, stop: int, where: str, model: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["prune", str(model), "--criterion", criterion, *CUT, *TEXT, "--threads", "1", "--checkpoint-every", "0"]
    assert main(*line, "-o", str(tmp_path / "whole"), "-q")[0] == 0
    real, saves = Ledger.save, 0

    def save(*arguments: object, **keywords: object) -> None:
        nonlocal saves
        real(*arguments, **keywords)  # type: ignore[arg-type]
        saves += 1
        if saves == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "save", save)
        assert main(*line, "-o", str(tmp_path / "out"), "-q")[0] == 130
    monkeypatch.setattr(backward, "_backward", None)  # which is not made again, nor is the graph
    monkeypatch.setattr(coupled, "_Graph", None)
    code, _, said = main(*line, "-o", str(tmp_path / "out"))
    assert code == 0 and f"going on after {where}, where" in said, said
    for name in ("model.safetensors", "receipt.json", "sensitivity/1-prune/importance.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("criterion", ["wanda", "flap", "activation"])
def test_activations_that_overflow_are_named(criterion: str, model: Path, tmp_path: Path, main: Main) -> None:
    for file in model.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e25
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    line = ["prune", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--criterion", criterion, *CUT, *TEXT]
    code, _, said = main(*line, "--no-refit", "-q")
    assert code == 2
    assert said == f"error: layer 1 ffn: costs by {criterion} are NaN or infinite: activations overflow\n"
