"""Properties of cutting whole decoder layers, through the front door: a layer that goes is the identity, no more."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.arch import family_of
from compress.checkpoint.headers import read_header
from compress.checkpoint.ledger import Ledger
from compress.cli import main
from compress.data import DataSpec, windows
from compress.errors import UserError
from compress.limits import DEPTH_POSITIONS
from compress.machine import Machine
from compress.plan import make_plan
from compress.recipe import Recipe
from compress.steps.prune.options import LAYER_CRITERIA, PruneOptions
from compress.steps.prune.plan import PrunePlan
from compress.trace import _traced
from tests import tiny
from tests.invariants.test_prune import masked_weights, prune
from tests.invariants.test_run import contents
from tests.matrix import LOADED
from tests.stock import load, logits

DATA = DataSpec(source="builtin", samples=6, length=64)  # as prune() takes it
DEEP = {"num_hidden_layers": 5}


def gone(out: Path) -> list[int]:
    found: list[int] = compress.load_receipt(out)["steps"][0]["layers"]["gone"]
    return found


def without(model: Any, folder: Path, layers: list[int]) -> Any:
    """The stock model with the identity in the place of `layers`."""
    decoder = model.get_submodule(family_of(read_header(folder)).text)

    def identity(module: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> Any:
        del module
        hidden = args[0] if args else given["hidden_states"]
        return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

    for index in layers:
        decoder.layers[index].register_forward_hook(identity, with_kwargs=True)
    return model


@pytest.mark.parametrize("family", LOADED)
def test_cutting_a_layer_puts_the_identity_in_its_place(family: str, tmp_path: Path) -> None:
    source = getattr(tiny, family)(tmp_path / "source", **({} if family == "gemma3_text" else DEEP))
    criterion = sorted(LAYER_CRITERIA)[LOADED.index(family) % len(LAYER_CRITERIA)]
    cuts = {"keep_layers": 3, "layer_criterion": criterion, "keep_ffn": 41}
    cuts |= {} if family == "qwen2_5_vl" else {"keep_heads": 4}  # its stock class takes no other number of heads
    out = prune(source, tmp_path / "out", refit=False, **cuts)
    assert len(gone(out)) == read_header(source).text_config["num_hidden_layers"] - 3
    masked, named = load(source), family_of(read_header(source)).parameter
    silenced = {named(name): value for name, value in masked_weights(source, out).items() if "visual" not in name}
    assert not masked.load_state_dict(silenced, strict=False).unexpected_keys
    inputs = [{"input_ids": torch.arange(40)[None]}]
    if "vision_config" in read_header(source).config:
        inputs.append(tiny.image_inputs())
    small = load(out)
    for given in inputs:
        torch.testing.assert_close(
            logits(small, given), logits(without(masked, source, gone(out)), given), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("written", [True, False])
def test_layers_that_do_not_rotate_are_the_same_after_the_cut(written: bool, tmp_path: Path) -> None:
    """smollm3 names them in a list, or by every how many; a layer that moves up must not change its nature."""
    source = tiny.smollm3(tmp_path / "source", num_hidden_layers=6, no_rope_layer_interval=3)
    silence(source, [1, 2])  # so these go
    if not written:
        config = json.loads((source / "config.json").read_text())
        del config["no_rope_layers"], config["layer_types"]
        (source / "config.json").write_text(json.dumps(config))
    out = prune(source, tmp_path / "out", keep_layers=4)
    assert gone(out) == [1, 2]
    assert json.loads((out / "config.json").read_text())["no_rope_layers"] == [1, 1, 1, 0]
    given = {"input_ids": torch.arange(40)[None]}
    torch.testing.assert_close(logits(load(out), given), logits(load(source), given), rtol=1e-5, atol=1e-5)


def silence(folder: Path, layers: list[int]) -> None:
    """Make `layers` write nothing into the residual stream."""
    tensors = load_file(folder / "model.safetensors")
    prefix = family_of(read_header(folder)).prefix
    for index in layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"{prefix(index)}{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("criterion", ["angular", "influence"])
def test_scores_are_those_of_the_paper(criterion: str, tmp_path: Path) -> None:
    """From the stock model's own layer inputs, in float64, one position at a time."""
    source = tiny.llama(tmp_path / "source", **DEEP)
    out = prune(source, tmp_path / "out", keep_layers=3, layer_criterion=criterion)
    found = json.loads((out / "sensitivity" / "1-prune" / "importance.json").read_text())["depth"]
    assert found == compress.load_receipt(out)["steps"][0]["layers"] and found["criterion"] == criterion
    model, seen = load(source), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    ids = torch.from_numpy(windows(DATA, "calibration", source, 0).ids)
    logits(model, {"input_ids": ids})
    states = [seen[0][0], *(out for _, out in seen)]  # six: [6, 64, hidden]
    if criterion == "influence":
        expected = [1 - sum(cosines(a, b, range(64))) / (6 * 64) for a, b in itertools.pairwise(states)]
        kept = sorted(sorted(range(5), key=expected.__getitem__)[2:])
    else:
        assert DEPTH_POSITIONS // 6 > 32  # so all of the later half
        angles = [
            [math.acos(c) for c in cosines(a, b, range(32, 64))] for a, b in zip(states, states[2:], strict=False)
        ]
        expected = [sum(each) / len(each) / math.pi for each in angles]
        first = min(range(4), key=expected.__getitem__)
        kept = [index for index in range(5) if index not in (first, first + 1)]
    assert found["scores"] == pytest.approx(expected, rel=1e-4)
    assert found["kept"] == kept


def test_layers_that_compute_with_their_number_do_not_change_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DiffLlama's lambda_init is a function of it: the rest would be another model, and load without a word."""
    from transformers.models.diffllama import modeling_diffllama as stock

    source = tiny.undescribed("diffllama", tmp_path / "source", num_hidden_layers=7)
    silence(source, [1, 2])
    refused = r"prune\.keep_layers: layers of this diffllama cannot go: the cut model is not the one without its first"
    with pytest.raises(UserError, match=refused):
        planned(source, keep_layers=4)
    assert "keep_layers" not in {cut["option"] for cut in compress.inspect(source)["cuts"]}
    # what the first two layers of a small instance do not show: nothing is cut, though the last one would be the same
    _traced.cache_clear()
    monkeypatch.setattr(stock, "lambda_init_fn", lambda index: 0.7 if index == 3 else 0.2)
    try:
        with pytest.raises(UserError, match="keep_layers: layer 3 of a diffllama gives something else as layer 1"):
            prune(source, tmp_path / "out", keep_layers=5, layer_criterion="influence")
    finally:
        _traced.cache_clear()
    assert not (tmp_path / "out").exists()


def cosines(one: torch.Tensor, other: torch.Tensor, positions: range) -> list[float]:
    pairs = [(a[p].double(), b[p].double()) for a, b in zip(one, other, strict=True) for p in positions]
    return [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "glm4", "qwen3_vl"])
def test_the_loss_without_a_layer_is_that_of_the_stock_model_without_it(family: str, tmp_path: Path) -> None:
    """Layer after layer, the whole stock model again: sliding windows, layers that do not rotate, capped logits, and
    layers that images enter, which do not go."""
    sizes = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2}
    sizes |= {"final_logit_softcapping": 2.0}
    source = getattr(tiny, family)(tmp_path / "source", **(sizes if family == "gemma3_text" else DEEP))
    layers = read_header(source).text_config["num_hidden_layers"]
    silence(source, [layers - 2])
    out = prune(source, tmp_path / "out", keep_layers=3, layer_criterion="loss", layer_samples=4)
    found = json.loads((out / "sensitivity" / "1-prune" / "importance.json").read_text())["depth"]
    assert found == compress.load_receipt(out)["steps"][0]["layers"] and "2402.02834" in found["paper"]
    ids = torch.from_numpy(windows(DATA, "calibration", source, 0).ids)[:4]
    whole = stock_loss(load(source), ids)
    rises = [stock_loss(without(load(source), source, [index]), ids) - whole for index in range(layers)]
    assert found["scores"] == pytest.approx(rises, rel=1e-4, abs=1e-6)
    assert max(map(abs, rises)) > 0.01 and abs(rises[layers - 2]) < 1e-7
    first = 2 if family == "qwen3_vl" else 0
    order = sorted(range(first, layers), key=rises.__getitem__)
    assert found["gone"] == sorted(order[: layers - 3])


@torch.no_grad()
def stock_loss(model: Any, ids: torch.Tensor) -> float:
    """Nats a token over all windows, from the stock model's own logits."""
    log_p = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return -float(log_p.gather(-1, ids[:, 1:, None]).mean())


def test_layers_by_loss_are_few_windows_that_the_plan_counts(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", **DEEP, dtype=torch.bfloat16)
    note = "layer_criterion loss: the model without each of 5 layers on {} x 64 tokens (layer_samples): as much work "
    note += "as 3 forward passes over them, and {} KiB of hidden states"
    first, second = (deep(source, tmp_path, layer_samples=n) for n in (2, 30))
    assert note.format(2, "192.0") in first.notes and note.format(20, "1920.0") not in first.notes
    assert any(each.startswith("layer_criterion loss") and "20 x 64" in each for each in second.notes)  # all there are
    by_angle = deep(source, tmp_path, layer_criterion="angular")
    assert not any("layer_criterion" in each for each in by_angle.notes)
    whole = tiny.llama(tmp_path / "wide", **DEEP, hidden_size=512)
    much, more = (deep(whole, tmp_path, samples=2000, layer_samples=n).memory for n in (2000, 1000))
    assert much - more == 1000 * 64 * 512 * 4 * 6 * 5 // 4  # the whole model and five without a layer


def deep(source: Path, folder: Path, *, samples: int = 20, **options: Any) -> PrunePlan:
    """The plan of two layers of the model, chosen by loss."""
    given = {"keep_layers": 2, "layer_criterion": "loss"} | options
    data = DataSpec(source="builtin", samples=samples, length=64)
    recipe = Recipe.single("prune", str(source), PruneOptions(**given), data=data)
    (step,) = make_plan(recipe, Machine(1), check_machine=False).steps
    assert isinstance(step, PrunePlan)
    return step


def test_layers_by_loss_from_the_command_line_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.llama(tmp_path / "source", **DEEP)
    line = ["prune", str(source), "--keep-layers", "4", "--layer-criterion", "loss", "--layer-samples", "2"]
    line += ["--samples", "6", "--length", "64", "--threads", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*line, "-o", str(one)]) == 0
    assert f"decoder layer {gone(one)[0]} goes, by loss" in capsys.readouterr().err
    assert main([*line, "-o", str(two), "-q"]) == 0
    first, second = ({k: v for k, v in contents(out).items() if k != "measured.json"} for out in (one, two))
    assert first == second and "by loss (Kim et al. 2024" in first["README.md"].decode()


@pytest.mark.parametrize("criterion", LAYER_CRITERIA)
def test_activations_that_overflow_name_their_layer(criterion: str, tmp_path: Path) -> None:
    """Layer 2 overflows by itself, so that no weight is at fault: without it the model would be a sound one."""
    source = tiny.llama(tmp_path / "source", **DEEP)
    tensors = load_file(source / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.2.mlp.{name}.weight"].mul_(1e18)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^layer 2: its output is NaN or infinite: activations overflow$"):
        prune(source, tmp_path / "out", keep_layers=3, layer_criterion=criterion)
    assert not (tmp_path / "out").exists()


def test_what_the_plan_counts_is_what_is_written(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", **DEEP)
    out = prune(source, tmp_path / "out", ratio=0.5, keep_layers=4)
    step = compress.load_receipt(out)["steps"][0]
    tensors = load_file(out / "model.safetensors")
    assert step["parameters"] == sum(value.numel() for value in tensors.values())
    whole = load_file(source / "model.safetensors")

    def matrices(all_of: dict[str, torch.Tensor]) -> int:
        return sum(value.numel() for name, value in all_of.items() if ".layers." in name and value.ndim == 2)

    assert step["removed"] == pytest.approx(1 - matrices(tensors) / matrices(whole))
    assert abs(step["removed"] - 0.5) < 0.02  # with the layer: the ratio is of all five


def test_a_target_counts_the_layers_that_go(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", **DEEP)
    target = 140_000
    out = prune(source, tmp_path / "out", params=target, keep_layers=4)
    found = compress.load_receipt(out)["steps"][0]
    assert 0.985 * target <= found["parameters"] <= target
    assert read_header(out).config["num_hidden_layers"] == 4 and read_header(out).config["intermediate_size"] < 96


def test_the_plan_tells_layers_and_cache(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", **DEEP)
    step = planned(source, keep_layers=2)
    assert step["layers"] == [5, 2]
    assert step["kv_cache_bytes"] == [2 * 5 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 4]  # K and V, layers, KV heads, width, bytes


def planned(source: Path, **options: Any) -> dict[str, Any]:
    recipe = source.parent / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(source), "steps": [{"prune": options}]}))
    step: dict[str, Any] = compress.plan(recipe, machine=Machine(1)).as_dict()["steps"][0]
    return step


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_layers": 6}, "6 layers cannot stay: the model has 5"),
        ({"keep_layers": 2, "ratio": 0.5}, "the layers alone remove 0.6000; ratio must be at least that, found 0.5"),
        ({"keep_layers": 2, "params": "1M"}, "1,000,000 removes nothing|1,000,000 is more than"),
        ({"keep_layers": 2, "layer_criterion": "angle"}, "unknown layer criterion 'angle'; did you mean 'angular'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", **DEEP)
    with pytest.raises(UserError, match=said):
        planned(source, **options)


def test_keeping_all_layers_keeps_the_bytes(tmp_path: Path) -> None:
    source = tiny.smollm3(tmp_path / "source", dtype=torch.bfloat16)
    out = prune(source, tmp_path / "out", keep_layers=2)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


RECIPE = """
model: {model}
data: {{calibration: {{samples: 4, length: 64}}, training: {{samples: 4, length: 64}}}}
steps:
  - prune: {{keep_layers: 3, ffn: 0.25}}
  - quantize: {{format: int8}}
evaluate: never
"""


def run(folder: Path, name: str, *more: str, code: int = 0) -> dict[str, bytes]:
    line = ["run", str(folder / "recipe.yaml"), "-o", str(folder / name), "--threads", "1", "--checkpoint-every", "0"]
    assert main([*line, "-q", *more]) == code
    return {} if code else {k: v for k, v in contents(folder / name).items() if k != "measured.json"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = tiny.smollm3(tmp_path / "model", num_hidden_layers=5, no_rope_layer_interval=3)
    silence(model, [0, 1])
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model))
    return tmp_path


def test_later_steps_carry_what_was_found(recipe: Path) -> None:
    """Their plans were made before it was known which layers stay."""
    steps = (recipe / "recipe.yaml").read_text().replace("  - q", "  - distill: {max_steps: 1, batch: 2}\n  - q")
    (recipe / "recipe.yaml").write_text(steps)
    run(recipe, "out")
    config = read_header(recipe / "out").config
    assert config["no_rope_layers"] == [0, 1, 1] and "quantization_config" in config


def test_a_pass_shared_with_quantize_leaves_the_bytes_of_two(recipe: Path) -> None:
    differ = ("recipe.yaml", "receipt.json", "README.md")
    one, two = (
        {name: content for name, content in run(recipe, *how).items() if name not in differ}
        for how in (("apart",), ("fused", "--set", "keep_intermediate=false"))
    )
    assert one == two and "model.safetensors" in one


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_pass_goes_on(at: int, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the choice, and after the second layer."""
    whole = run(recipe, "whole")
    real, calls = Ledger.save, []

    def counted(self: Ledger, *state: object) -> None:
        real(self, *state)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "save", counted)
        run(recipe, "out", code=130)
    from compress.steps.prune import depth

    monkeypatch.setattr(depth, "METHODS", {})  # what was found is not looked for again
    assert run(recipe, "out") == whole


def test_scores_of_layers_that_went_are_absent_not_wrong(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", **DEEP)
    out = prune(source, tmp_path / "out", keep_layers=3, ffn=0.25, heads=0.5)
    found = compress.load_sensitivity(out)
    stayed = [index for index in range(5) if index not in gone(out)]
    assert sorted(set(found.layers().layer)) == sorted(set(found.units("ffn").layer)) == stayed
    image = found.plot_heads().axes[0].images[0].get_array()
    assert image is not None and image.shape == (8, 5)
    assert [bool((image[:, index] > 0).any()) for index in range(5)] == [index in stayed for index in range(5)]
    found.plot_curves("ffn"), found.plot_cut()
