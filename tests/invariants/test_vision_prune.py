"""Cutting the vision tower, through the front door: what was cut is what was masked, and the decoder sees the rest."""

from __future__ import annotations

import itertools
import json
import shutil
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
from compress.criteria import CRITERIA
from compress.data import DataSpec, processor_of, windows
from compress.errors import UserError
from compress.limits import DEPTH_POSITIONS
from compress.machine import Machine
from compress.plan import make_plan
from compress.receipt import changes
from compress.recipe import Recipe
from compress.run import run
from compress.solve import damping_vector, refit
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.tower import VISION_LAYER_CRITERIA
from compress.stream import GRADIENTS, WHOLE
from tests import sight, tiny
from tests.invariants.test_prune import masked_weights
from tests.invariants.test_run import MOMENT, contents
from tests.stock import load, logits

VISUAL, MERGER = "model.visual", "model.visual.merger"
DEPTH, WIDTH = 4, 64  # of the sources here: deeper than a pico tower, so that there is a choice
QUIET = (1, 2)  # these go first, and what stands behind them moves
CUT = {"keep_vision_layers": 2, "keep_vision_ffn": 24}
RANKED = [name for name, each in CRITERIA.items() if not each.needs & (GRADIENTS | WHOLE)]


def deep(source: Path) -> Path:
    """The pico model in `source` with DEPTH vision blocks, copies of its own, apart by noise; QUIET ones do little."""
    tensors = load_file(source / "model.safetensors")
    draw = torch.Generator().manual_seed(7)
    for index in range(2, DEPTH):
        for name in [name for name in tensors if name.startswith(f"{VISUAL}.blocks.{index % 2}.")]:
            value = tensors[name]
            noise = 0.5 * value.float().std() * torch.randn(value.shape, generator=draw)
            new = name.replace(f"blocks.{index % 2}.", f"blocks.{index}.")
            tensors[new] = (value.float() + noise).to(value.dtype)
    for index in QUIET:
        for name in ("attn.proj.weight", "mlp.down_proj.weight"):
            tensors[f"{VISUAL}.blocks.{index}.{name}"] *= 0.2
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["depth"] = DEPTH
    (source / "config.json").write_text(json.dumps(config, indent=2))
    return sight.can_see(source)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep(tiny.glm4v(tmp_path_factory.mktemp("vision") / "model"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sight.chats(tmp_path_factory.mktemp("vision"), count=40)


def data(chats: Path, **more: Any) -> DataSpec:
    return DataSpec(**{"source": str(chats), "samples": 20, "length": 64, **more})


def prune(source: Path, out: Path, spec: DataSpec, **options: Any) -> Path:
    return run(Recipe.single("prune", str(source), PruneOptions(**options), data=spec), out, Machine(1)).out


def said(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = compress.load_receipt(out)["steps"][0]["vision"]
    return found


def kept(out: Path) -> torch.Tensor:
    return load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")["vision.ffn.keep"].long()


def masked(source: Path, out: Path) -> Any:
    """The stock model of `source`, with the identity in the place of every vision block that went, and zeros for what
    a neuron of the merger that went would add; what went of the decoder is silenced as well."""
    whole = load(source)
    named = family_of(read_header(source)).parameter
    state = {named(name): value for name, value in masked_weights(source, out).items() if "visual" not in name}
    assert not whole.load_state_dict(state, strict=False).unexpected_keys
    about = said(out)
    blocks = whole.get_submodule(f"{VISUAL}.blocks")
    layers = compress.load_receipt(out)["steps"][0].get("layers", {"gone": []})["gone"]
    for index in layers:
        decoder = whole.get_submodule(f"{family_of(read_header(source)).text}.layers")
        decoder[index].register_forward_hook(lambda module, args, out: args[0])
    assert set(about.get("layers", {"gone": []})["gone"]) <= set(QUIET)
    for index in about.get("layers", {"gone": []})["gone"]:
        blocks[index].register_forward_hook(lambda module, args, out: args[0])
    if "ffn" in about:
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[kept(out)] = False
        assert 0 < gone.sum() < WIDTH
        with torch.no_grad():
            whole.get_submodule(f"{MERGER}.down_proj").weight[:, gone] = 0
    return whole


CUTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers": ("glm4v", {"keep_vision_layers": 3}, "glm4v"),
    "ffn": ("glm4v", {"keep_vision_ffn": 17}, "glm4v"),
    "all": ("glm4v", {**CUT, "keep_ffn": 77, "keep_heads": 6}, "glm46v"),
    "kv": ("glm4v", {**CUT, "keep_kv_heads": 1, "kv_merge": "drop", "layer_criterion": "influence"}, "glm46v"),
    "layers-of-both": ("glm4v", {**CUT, "keep_layers": 1, "keep_ffn": 77}, "glm4v"),
    "portable": ("glm46v", {**CUT, "keep_heads": 4}, "glm46v"),
    "interleaved": ("glm46v_interleaved", {**CUT, "keep_heads": 6, "keep_ffn": 77}, "glm46v"),
}


@pytest.mark.parametrize("cut", CUTS)
def test_cutting_is_masking(cut: str, chats: Path, tmp_path: Path) -> None:
    family, options, label = CUTS[cut]
    source = deep(getattr(tiny, family)(tmp_path / "source"))
    out = prune(source, tmp_path / "out", data(chats), refit=False, **options)
    config = read_header(out).config
    assert config["model_type"] == label
    assert config["vision_config"]["depth"] == options.get("keep_vision_layers", DEPTH)
    assert config["vision_config"]["intermediate_size"] == options.get("keep_vision_ffn", WIDTH)
    given = tiny.image_inputs()
    small, silenced = logits(load(out), given), logits(masked(source, out), given)
    torch.testing.assert_close(small, silenced, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(silenced, logits(load(source), given), rtol=1e-2, atol=1e-2)
    if "keep_ffn" not in options and "keep_heads" not in options and "keep_kv_heads" not in options:
        text = {"input_ids": torch.arange(40)[None]}
        assert torch.equal(logits(load(out), text), logits(load(source), text))


def test_a_native_checkpoint_is_cut_as_its_portable_twin(chats: Path, tmp_path: Path) -> None:
    """Stock transformers does not load it; the vision tower is the same under both labels."""
    source = deep(tiny.glm4v_native(tmp_path / "source"))
    native = prune(source, tmp_path / "native", data(chats), **CUT, flavour="native")
    portable = prune(source, tmp_path / "portable", data(chats), **CUT, keep_heads=4)
    one, two = (load_file(out / "model.safetensors") for out in (native, portable))
    seen = [name for name in one if name.startswith(VISUAL)]
    assert len(seen) == len([name for name in two if name.startswith(VISUAL)])
    assert all(torch.equal(one[name], two[name]) for name in seen)


def test_the_refit_is_the_ridge_on_what_the_cut_blocks_give(model: Path, chats: Path, tmp_path: Path) -> None:
    out = prune(model, tmp_path / "out", data(chats), **CUT)
    about = said(out)["ffn"]
    assert 0 < about["relative_output_error"]["error"] < about["relative_output_error"]["error_without_refit"]
    inputs = merger_inputs(model, data(chats), said(out)["layers"]["gone"])
    assert about["image_tokens"] == len(inputs)
    weight = load_file(model / "model.safetensors")[f"{MERGER}.down_proj.weight"]
    hessian = inputs.T @ inputs / len(inputs)
    cost = weight.square().sum(0) * hessian.diagonal()
    scores = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    torch.testing.assert_close(scores["vision.ffn.cost"], cost, rtol=1e-4, atol=1e-6)
    expected = refit(weight, hessian, kept(out), damping_vector(hessian, 0.01)).weight
    written = load_file(out / "model.safetensors")
    torch.testing.assert_close(written[f"{MERGER}.down_proj.weight"], expected, rtol=1e-3, atol=1e-5)
    source = load_file(model / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        rows = source[f"{MERGER}.{name}.weight"][kept(out)]
        assert torch.equal(written[f"{MERGER}.{name}.weight"], rows)


def merger_inputs(model: Path, spec: DataSpec, gone: list[int]) -> torch.Tensor:
    """What the merger's down_proj reads in the stock model of all images in the calibration [tokens, n]."""
    whole, seen = load(model), []
    for index in gone:
        whole.get_submodule(f"{VISUAL}.blocks")[index].register_forward_hook(lambda module, args, out: args[0])
    whole.get_submodule(f"{MERGER}.down_proj").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = windows(spec, "calibration", model, 0, images=True)
    with torch.no_grad():
        whole(**sight.stock_inputs(model, tokens), use_cache=False)
    return torch.cat(seen)


@pytest.mark.parametrize("criterion", VISION_LAYER_CRITERIA)
def test_layers_go_by_what_the_stock_tower_does(criterion: str, model: Path, chats: Path, tmp_path: Path) -> None:
    out = prune(model, tmp_path / "out", data(chats), keep_vision_layers=2, layer_criterion=criterion)
    whole, states = load(model), []
    blocks = whole.get_submodule(f"{VISUAL}.blocks")
    blocks[0].register_forward_pre_hook(lambda module, args: states.append([args[0]]))
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: states[-1].append(out))
    tokens = windows(data(chats), "calibration", model, 0, images=True)
    processor = processor_of(model)
    for window in tokens.images:
        for image in window:
            pixels, grids = processor.pixels([image])
            with torch.no_grad():
                whole.model.get_image_features(torch.from_numpy(pixels), image_grid_thw=torch.from_numpy(grids))
    cosine = torch.nn.functional.cosine_similarity
    together = [torch.cat([each[index] for each in states]) for index in range(DEPTH + 1)]
    if criterion == "influence":
        expected = [1 - float(cosine(*pair, dim=-1).mean()) for pair in itertools.pairwise(together)]
        order = sorted(range(DEPTH), key=expected.__getitem__)
        gone = sorted(order[:2])
    else:  # every image gives all its patches
        assert all(len(each[0]) <= DEPTH_POSITIONS // len(states) for each in states)
        ends = zip(together, together[2:], strict=False)
        expected = [float(cosine(*pair, dim=-1).arccos().mean()) / torch.pi for pair in ends]
        first = expected.index(min(expected))
        gone = [first, first + 1]
    assert said(out)["layers"]["gone"] == gone
    assert said(out)["layers"]["scores"] == pytest.approx(expected, rel=1e-3)
    source, written = (load_file(folder / "model.safetensors") for folder in (model, out))
    for place, index in enumerate(said(out)["layers"]["kept"]):
        for name in ("attn.qkv.weight", "mlp.down_proj.weight", "norm1.weight"):
            assert torch.equal(written[f"{VISUAL}.blocks.{place}.{name}"], source[f"{VISUAL}.blocks.{index}.{name}"])


@pytest.mark.parametrize("criterion", RANKED)
def test_the_merger_is_ranked_by_every_criterion_of_inputs(
    criterion: str, model: Path, chats: Path, tmp_path: Path
) -> None:
    out = prune(model, tmp_path / "out", data(chats), keep_vision_ffn=24, criterion=criterion, held_out=0.4)
    about = said(out)["ffn"]
    assert about["criterion"] == criterion and about["paper"] == CRITERIA[criterion].paper
    errors = about["relative_output_error"]
    assert 0 < errors["error"] < errors["error_without_refit"] and errors["error_held_out"] > 0
    assert len(kept(out)) == about["keep"] == 24 and about["units"] == WIDTH


def test_the_decoder_sees_what_the_cut_tower_gives(model: Path, chats: Path, tmp_path: Path) -> None:
    """Wanda's costs of the second decoder layer are those of the stock model of the result, which sees through it."""
    out = prune(model, tmp_path / "out", data(chats), **CUT, keep_ffn=96)
    scores = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    stock, seen = load(out), []
    reader = stock.get_submodule("model.language_model.layers.1.mlp.down_proj")
    reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = windows(data(chats), "calibration", model, 0, images=True)
    assert tokens.kinds is not None
    with torch.no_grad():
        stock(**sight.stock_inputs(model, tokens), use_cache=False)
    keep = scores["layers.1.ffn.keep"].long()
    source = load_file(model / "model.safetensors")["model.language_model.layers.1.mlp.down_proj.weight"]
    real = torch.from_numpy(tokens.kinds != 0)
    cost = source[:, keep].square().sum(0) * seen[0][real].square().mean(0)
    torch.testing.assert_close(scores["layers.1.ffn.cost"][keep], cost, rtol=1e-3, atol=1e-5)


def test_a_ranking_that_was_measured_names_the_criterion(model: Path, chats: Path, tmp_path: Path) -> None:
    """A sensitivity folder knows the decoder's units alone: the merger's are ranked by the same criterion, anew."""
    where = ["--data", str(chats), "--samples", "20", "--length", "64", "--threads", "1", "-q", "--no-pictures"]
    assert main(["sensitivity", str(model), "-o", str(tmp_path / "seen"), "--criterion", "obs", *where]) == 0
    how = {"keep_vision_ffn": 24, "keep_ffn": 96, "from_sensitivity": str(tmp_path / "seen")}
    out = prune(model, tmp_path / "out", data(chats), **how)
    alone = prune(model, tmp_path / "alone", data(chats), keep_vision_ffn=24, criterion="obs")
    assert said(out) == said(alone) and torch.equal(kept(out), kept(alone))
    found = compress.load_sensitivity(out)
    assert len(found.units("ffn")) == 2 * 128


@pytest.mark.parametrize("family", ["glm4v", "glm46v", "glm46v_interleaved", "glm4v_native"])
def test_keeping_all_keeps_the_bytes(family: str, tmp_path: Path) -> None:
    """No image is needed for that."""
    source = getattr(tiny, family)(tmp_path / "source", dtype=torch.bfloat16)
    spec = DataSpec(source="builtin", samples=2, length=64)
    out = prune(source, tmp_path / "out", spec, keep_vision_layers=2, keep_vision_ffn=WIDTH)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert "vision" not in compress.load_receipt(out)["steps"][0]


def flags(source: Path, out: Path, chats: Path | str, *more: str) -> list[str]:
    where = ["--data", str(chats), "--samples", "20", "--length", "64", "-q", "--threads", "1"]
    return ["prune", str(source), "-o", str(out), *where, *more]


def left(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if name not in MOMENT}


INTERRUPTED = ("--keep-vision-layers", "2", "--keep-vision-ffn", "24", "--keep-layers", "1", "--ffn", "0.3")
INTERRUPTED += ("--checkpoint-every", "0")


@pytest.fixture(scope="module")
def whole(model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nobody disturbs leaves, twice."""
    first, again = (tmp_path_factory.mktemp("whole") / "out" for _ in range(2))
    assert main(flags(model, first, chats, *INTERRUPTED)) == 0
    assert main(flags(model, again, chats, *INTERRUPTED)) == 0
    assert left(first) == left(again)
    return left(first)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_goes_on(
    at: int, model: Path, chats: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the tower was cut, after the choice of decoder layers, and after the first of them."""
    real, calls = Ledger.save, []

    def counted(self: Ledger, *state: object) -> None:
        real(self, *state)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "save", counted)
        assert main(flags(model, tmp_path / "out", chats, *INTERRUPTED)) == 130
    from compress.steps.prune import vision

    monkeypatch.setattr(vision, "METHODS", {})  # what was found is not looked for again
    monkeypatch.setattr(vision, "refit", None)
    assert main(flags(model, tmp_path / "out", chats, *INTERRUPTED)) == 0
    assert left(tmp_path / "out") == whole


def test_with_a_fused_quantize_step_the_bytes_are_those_of_both(chats: Path, tmp_path: Path) -> None:
    """The vision tower is cut, and not quantized."""
    model = deep(tiny.glm4v(tmp_path / "model", dtype=torch.bfloat16))

    def made(name: str, keep: bool) -> Path:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            f"model: {model}\nsteps:\n"
            "  - prune: {keep_vision_layers: 2, keep_vision_ffn: 24, keep_ffn: 96, keep_heads: 6}\n"
            "  - quantize: {format: int8}\n"
            f"data:\n  calibration: {{source: {chats}, samples: 20, length: 64}}\nevaluate: never\n"
            f"keep_intermediate: {str(keep).lower()}\n"
        )
        assert main(["run", str(recipe), "-o", str(tmp_path / name), "--threads", "1", "-q"]) == 0
        return tmp_path / name

    fused, apart = (load_file(made(name, keep) / "model.safetensors") for name, keep in (("a", False), ("b", True)))
    assert fused.keys() == apart.keys()
    assert all(torch.equal(value, apart[name]) for name, value in fused.items())
    seen = {name: value for name, value in fused.items() if name.startswith(VISUAL)}
    assert seen and {value.dtype for value in seen.values()} == {torch.bfloat16}
    assert any(value.dtype == torch.int8 for value in fused.values())
    assert seen[f"{MERGER}.down_proj.weight"].shape[1] == 24


@pytest.mark.parametrize("target", ["params", "bytes"])
def test_targets_count_what_goes_from_the_tower(target: str, model: Path, chats: Path) -> None:
    whole = planned(model, data(chats), **CUT)
    limit = whole.parameters if target == "params" else whole.nbytes
    found = planned(model, data(chats), **CUT, **{target: limit})  # the tower alone gets there: the FFN stays
    assert found.parameters == whole.parameters and found.keep == whole.keep
    narrower = planned(model, data(chats), **CUT, **{target: round(0.95 * limit)})
    same = planned(model, data(chats), **{target: round(0.95 * limit)})
    assert narrower.keep[0]["ffn"] > same.keep[0]["ffn"]
    assert any("vision tower: 2 of 4 layers stay" in note for note in whole.notes)
    assert any("vision tower: 24 of 64 FFN neurons of the merger stay" in note for note in whole.notes)


def planned(model: Path, spec: DataSpec, **options: Any) -> Any:
    recipe = Recipe.single("prune", str(model), PruneOptions(force=True, **options), data=spec)
    return make_plan(recipe, Machine(1), where=None).steps[0]


def test_what_is_planned_is_what_is_written(model: Path, chats: Path, tmp_path: Path) -> None:
    out = prune(model, tmp_path / "out", data(chats), **CUT)
    found = planned(model, data(chats), **CUT)
    assert found.nbytes == (out / "model.safetensors").stat().st_size
    assert found.parameters == sum(spec.parameters for spec in read_header(out).tensors.values())
    whole = make_plan(Recipe.single("prune", str(model), PruneOptions(**CUT), data=data(chats)), Machine(1))
    step = whole.as_dict()["steps"][0]
    assert (step["vision_layers"], step["vision_ffn"]) == ([4, 2], [64, 24])
    assert changes(whole.steps[0]) == "vision layers 4 -> 2, vision FFN 64 -> 24"
    card = (out / "README.md").read_text()
    assert "cut the vision tower: layers " in card and "24 of 64 FFN neurons of its merger stay, by wanda" in card
    gone = sum(spec.parameters for spec in read_header(model).tensors.values()) - found.parameters
    assert any(f"vision tower: {gone:,} parameters go, {4 * gone:,} bytes in F32" in note for note in found.notes)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_the_merger_can_be_cut_without_images(criterion: str, model: Path, tmp_path: Path) -> None:
    """And the decoder beside it, on text, its layers too."""
    spec = DataSpec(source="builtin", samples=6, length=64)
    options = {"keep_vision_ffn": 24, "criterion": criterion, "refit": False, "keep_ffn": 96, "keep_layers": 1}
    out = prune(model, tmp_path / "out", spec, **options)
    again = prune(model, tmp_path / "again", spec, **options)
    assert torch.equal(kept(out), kept(again))
    weights = load_file(model / "model.safetensors")
    down = load_file(out / "model.safetensors")[f"{MERGER}.down_proj.weight"]
    assert torch.equal(down, weights[f"{MERGER}.down_proj.weight"][:, kept(out)])
    if criterion == "magnitude":
        parts = [weights[f"{MERGER}.{name}.weight"].square().sum(1) for name in ("gate_proj", "up_proj")]
        norm = sum(parts) + weights[f"{MERGER}.down_proj.weight"].square().sum(0)
        assert set(kept(out).tolist()) == set(norm.topk(24).indices.tolist())


def refusal(model: Path, spec: DataSpec, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        planned(model, spec, **options)
    return f"{caught.value.message} | {caught.value.hint}"


def test_what_cannot_be_is_refused_before_a_run(model: Path, chats: Path, tmp_path: Path) -> None:
    text, seen = DataSpec(source="builtin", samples=5, length=64), data(chats)
    assert "--keep-vision-layers: 5 vision layers cannot stay: the vision tower has 4" in refusal(
        model, seen, keep_vision_layers=5
    )
    found = refusal(model, seen, keep_vision_ffn=65, keep_vision_layers=9)
    assert "65 neurons cannot stay: the FFN of its vision tower's merger has 64" in found and "tower has 4" in found
    assert "found on images, and the calibration data have none | give calibration data" in refusal(
        model, text, keep_vision_layers=2
    )
    assert "wanda looks at them, and the calibration data have no images | " in refusal(model, text, keep_vision_ffn=9)
    assert "the refit looks at them" in refusal(model, text, keep_vision_ffn=9, criterion="magnitude")
    assert "taylor does not rank the neurons of a vision merger; what does: wanda, obs" in refusal(
        model, seen, keep_vision_ffn=9, criterion="taylor"
    )
    for other, what in ((tiny.llama, "has none"), (tiny.qwen3_vl, "of a kind that is not cut")):
        folder = other(tmp_path / other.__name__)
        said = refusal(folder, text, keep_vision_layers=1, keep_vision_ffn=9)
        assert what in said and "glm4v and glm46v" in said and said.startswith("2 problems")


def test_a_tower_that_is_not_what_its_config_says_is_refused(model: Path, chats: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())

    def with_vision(**changes: Any) -> str:
        new = {**config, "vision_config": {**config["vision_config"], **changes}}
        (source / "config.json").write_text(json.dumps(new))
        return refusal(source, data(chats), keep_vision_ffn=9)

    assert "the tensors are of 4 vision blocks, config.json says 3" in with_vision(depth=3)
    assert "vision_config.depth must be a positive whole number, found '2'" in with_vision(depth="2")
    assert "gate_proj.weight' has shape [64, 64], config.json implies [32, 64]" in with_vision(intermediate_size=32)


def test_too_few_images_are_told_before_a_weight_is_read(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.stream import vision

    monkeypatch.setattr(vision, "_filled", None)
    spec = data(chats, samples=1)
    mixed = {str(chats): 1, "builtin": 9}
    how = {"keep_vision_ffn": 24, "held_out": 0.05, "force": True}
    with pytest.raises(UserError, match="held_out: the last 1 of 20 windows, held back, have none of the images"):
        prune(model, tmp_path / "out", data(chats, source=mixed), **how)
    text = json.dumps({"messages": [{"role": "user", "content": "words " * 8}]}) + "\n"
    few = chats.parent / "few.jsonl"
    few.write_text(text * 30 + chats.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="keep_vision_layers: no calibration window shows an image"):
        prune(model, tmp_path / "out", data(few, samples=2), keep_vision_layers=2)
    with pytest.raises(UserError, match=r"\d+ calibration tokens of images for a Gram matrix of 64 columns"):
        prune(model, tmp_path / "out", spec, keep_vision_ffn=24, keep_ffn=128)
