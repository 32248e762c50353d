"""Calibration with images, through the front door: statistics of what the stock model sees, resume, every refusal."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.cli import main
from compress.data import IMAGE, PADDING, DataSpec, windows
from compress.data.tokens import Tokens
from compress.errors import UserError
from compress.limits import DEPTH_POSITIONS
from compress.machine import Machine
from compress.plan import make_plan
from compress.receipt import load_receipt
from compress.recipe import Recipe
from compress.run import run
from compress.steps.distill.options import DistillOptions
from compress.steps.prune.options import LAYER_CRITERIA, PruneOptions
from tests import sight, tiny
from tests.faults.test_resume import interrupt
from tests.invariants.test_run import MOMENT, contents
from tests.stock import load
from tests.unit.test_vision import stock_states

LAYER = "model.language_model.layers.{}.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sight.can_see(tiny.glm4v(tmp_path_factory.mktemp("images") / "model"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sight.chats(tmp_path_factory.mktemp("images"))


def data(source: Any, **more: Any) -> DataSpec:
    return DataSpec(
        **{"source": source if isinstance(source, dict) else str(source), "samples": 5, "length": 64, **more}
    )


def prune(model: Path, out: Path, spec: DataSpec, **options: Any) -> Path:
    return run(Recipe.single("prune", str(model), PruneOptions(**options), data=spec), out, Machine(1)).out


def test_statistics_are_of_what_the_stock_model_sees(model: Path, chats: Path, tmp_path: Path) -> None:
    """Wanda's costs, of the dense first layer and of the second one behind the cut first: squares of what the readers
    get in the stock model with pixel values, padding left out."""
    out = prune(model, tmp_path / "out", data(chats), keep_ffn=96, refit=False)
    tokens = windows(data(chats), "calibration", model, 0, images=True)
    assert tokens.kinds is not None
    real = torch.from_numpy(tokens.kinds != 0)
    assert 0 < real.sum() < real.numel()
    scores = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    for folder, index in ((model, 0), (out, 1)):
        stock, seen = load(folder), []
        reader = stock.get_submodule(LAYER.format(index))
        reader.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            stock(**sight.stock_inputs(model, tokens), use_cache=False)
        cost = reader.weight.square().sum(0) * seen[0][real].square().mean(0)
        keep = scores[f"layers.{index}.ffn.keep"].long()
        found = scores[f"layers.{index}.ffn.cost"]
        torch.testing.assert_close(found if index == 0 else found[keep], cost, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_ffn": 96, "keep_heads": 6},
        {"keep_kv_heads": 1, "keep_ffn": 96, "held_out": 0.4, "token_weights": "norm"},
        {"ffn": 0.3, "token_shares": {"image": 0.2, "prompt": 0.3, "answer": 0.5}},
        {"ffn": 0.3, "criterion": "fisher"},
        {"keep_ffn": 96, "error_propagation": 0.5, "joint_refit": 1},
    ],
    ids=["heads", "kv", "shares", "gradients", "propagation"],
)
def test_pruning_with_images_ends_and_reloads(
    options: dict[str, Any], model: Path, chats: Path, tmp_path: Path
) -> None:
    out = prune(model, tmp_path / "out", data(chats), **options)
    receipt = load_receipt(out)["steps"][0]
    kinds = {"padding", "image", "prompt", "answer"} if "token_shares" in options else {"padding", "image", "text"}
    assert receipt["calibration"]["kinds"].keys() == kinds
    assert sum(receipt["calibration"]["kinds"].values()) == receipt["calibration"]["tokens"] == 5 * 64


@pytest.mark.parametrize("criterion", LAYER_CRITERIA)
def test_layers_are_chosen_by_what_the_stock_model_makes_of_images(criterion: str, chats: Path, tmp_path: Path) -> None:
    """Padding does not count, neither it nor images are predicted."""
    model = sight.can_see(tiny.glm4v(tmp_path / "model", num_hidden_layers=4))
    out = prune(model, tmp_path / "out", data(chats), keep_layers=3, layer_criterion=criterion)
    tokens = windows(data(chats), "calibration", model, 0, images=True)
    assert tokens.kinds is not None and (tokens.kinds == 0).any()
    real = torch.from_numpy(tokens.kinds != 0)
    states, cosine = stock_states(model, tokens), torch.nn.functional.cosine_similarity
    pairs = [(before[real], after[real]) for before, after in itertools.pairwise(states)]
    if criterion == "influence":
        expected = [1 - float(cosine(*pair, dim=-1).mean()) for pair in pairs]
    elif criterion == "angular":
        length = real.sum(1, keepdim=True)
        each = min(DEPTH_POSITIONS // len(real), 64 // 2)
        at = torch.arange(len(real))[:, None], length - 1 - length // 2 * torch.arange(each) // each
        assert real[at].all()
        angles = [cosine(before[at], after[at], dim=-1).arccos() for before, after in itertools.pairwise(states)]
        expected = [float(angle.mean()) / torch.pi for angle in angles]
    else:
        expected = [stock_loss(model, tokens, layer) - stock_loss(model, tokens, None) for layer in range(4)]
    about = load_receipt(out)["steps"][0]["layers"]
    assert about["scores"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert about["gone"] == [expected.index(min(expected))]


def stock_loss(model: Path, tokens: Tokens, without: int | None) -> float:
    """Nats a token of the stock model with images, with the identity in the place of one layer."""
    assert tokens.kinds is not None
    stock = load(model)
    if without is not None:
        layer = stock.get_submodule(f"model.language_model.layers.{without}")
        layer.register_forward_hook(lambda module, args, out: args[0])
    with torch.no_grad():
        said = stock(**sight.stock_inputs(model, tokens), use_cache=False).logits[:, :-1].log_softmax(-1)
    ids, kinds = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.kinds)
    told = (kinds != PADDING) & (kinds != IMAGE)
    return -float(said.gather(-1, ids[:, 1:, None])[..., 0][told[:, 1:]].mean())


def test_images_stand_beside_other_sources(model: Path, chats: Path, tmp_path: Path) -> None:
    out = prune(model, tmp_path / "out", data({str(chats): 1, "builtin": 3}, samples=12), ffn=0.3)
    kinds = load_receipt(out)["steps"][0]["calibration"]["kinds"]
    assert kinds["text"] > 9 * 64 and kinds["image"] > 0


def test_an_interrupted_run_goes_on_and_other_images_start_anew(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "data"
    shutil.copytree(chats.parent, mine)

    def command(out: Path) -> list[str]:
        flags = ["--ffn", "0.3", "--data", str(mine / "chats.jsonl"), "--samples", "5", "--length", "64", "-q"]
        return ["prune", str(model), "-o", str(out), *flags, "--threads", "1", "--checkpoint-every", "0"]

    def left(out: Path) -> dict[str, bytes]:
        assert main(command(out)) == 0
        return {name: content for name, content in contents(out).items() if name not in MOMENT}

    whole = left(tmp_path / "whole")
    from compress.checkpoint.ledger import Ledger

    with monkeypatch.context() as patch:
        interrupt(patch, Ledger, "save", 1)
        assert main(command(tmp_path / "out")) == 130
    assert left(tmp_path / "out") == whole
    shutil.copyfile(mine / "shots" / "1.png", mine / "shots" / "0.png")
    changed = left(tmp_path / "changed")
    digests = [json.loads(each["receipt.json"])["steps"][0]["calibration"]["digest"] for each in (whole, changed)]
    assert digests[0] != digests[1]


def refusal(model: Path, spec: DataSpec, options: Any = None, kind: str = "prune") -> str:
    recipe = Recipe.single(kind, str(model), options or PruneOptions(ffn=0.3, force=True), data=spec)
    with pytest.raises(UserError) as caught:
        make_plan(recipe, Machine(1), where=None)
    assert "\n" not in caught.value.message
    return caught.value.message


def told(folder: Path, image: Any, text: str = "x" * 300) -> Path:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    path = folder / "told.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}) + "\n")
    return path


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("../secret.png", "must be a path inside"),
        ("/etc/passwd", "must be a path inside"),
        ("link.png", "must be a path inside"),
        ("https://example.com/a.png", "must be a path inside"),
        ("data:image/png;base64,AAAA", "must be a path inside"),
        ("gone.png", "no such image, "),
        ("text.png", "text.png is no image that can be read"),
        (5, "an image must be {type: image, image: its path}"),
        ("long.png", "pixels, and 200 times as long as wide is the most"),
        ("exif.png", "exif.png is no image that can be read (not a TIFF file"),
    ],
)
def test_images_that_cannot_be_read_are_refused_before_a_run(
    image: Any, said: str, model: Path, tmp_path: Path
) -> None:
    from PIL import Image

    (tmp_path / "secret.png").write_bytes(b"not to be read")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (9000, 30)).save(folder / "long.png")
    Image.new("RGB", (60, 30)).save(folder / "exif.png", exif=b"Exif\0\0garbage!")
    found = refusal(model, data(told(folder, image), samples=1))
    assert said in found and found.count("line 1, message 1") == 1


def test_what_does_not_take_images_says_so(model: Path, chats: Path, tmp_path: Path) -> None:
    assert "a window is of whole documents" in refusal(model, data(chats, samples=11))
    assert "tokens, and a window is 8" in refusal(model, data(chats, length=8))
    assert "tp-taylor takes text alone" in refusal(model, data(chats), PruneOptions(ffn=0.3, criterion="tp-taylor"))
    assert "images are for the calibration of prune" in refusal(model, data(chats), DistillOptions(), "distill")
    other = tiny.qwen2_5_vl(tmp_path / "qwen")
    shutil.copyfile(model / "chat_template.jinja", other / "chat_template.jinja")
    assert "a qwen2_5_vl calibrates on text alone" in refusal(other, data(chats))
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json" in refusal(bare, data(chats))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"do_resize": False}, "do_resize must be true"),
        ({"size": {"height": 28, "width": 28}}, "the stock processor fails with it: "),
        ({"image_mean": [0.5]}, "the stock processor fails with it: "),
        ({"resample": 99}, "the stock processor fails with it: "),
    ],
)
def test_what_the_stock_processor_fails_with_is_one_line(
    changes: dict[str, Any], said: str, model: Path, chats: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = other / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        prune(other, tmp_path / "out", data(chats), ffn=0.3, force=True)
    assert said in caught.value.message and "preprocessor_config.json: " in caught.value.message
    assert "\n" not in caught.value.message and not (tmp_path / "out").exists()


def test_an_image_that_ends_too_soon_is_named(model: Path, chats: Path, tmp_path: Path) -> None:
    shutil.copytree(chats.parent / "shots", tmp_path / "shots")
    shot = tmp_path / "shots" / "0.png"
    shot.write_bytes(shot.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"line 1, message 1: 0\.png is no image that can be read \(.*truncated"):
        prune(model, tmp_path / "out", data(told(tmp_path, "shots/0.png", "short"), samples=1), ffn=0.3, force=True)


@pytest.mark.parametrize("where", ["a chat", "a text beside it", "another source"])
def test_the_mark_of_an_image_in_a_text_that_shows_none_is_refused(
    where: str, model: Path, chats: Path, tmp_path: Path
) -> None:
    """It would be taken for one of the next window's, or have no image left."""
    told(chats.parent, "shots/0.png", "short")
    path, text = chats.parent / "told.jsonl", "what does <|image|> mean? " * 8
    alone = {"messages": [{"role": "user", "content": text}]}
    more: dict[str, Any] = {"a chat": alone, "a text beside it": {"text": text}}
    source: Any = path
    if where in more:
        path.write_text(path.read_text() + json.dumps(more[where]) + "\n")
    else:
        (tmp_path / "marked.txt").write_text(text * 8)
        source = {str(path): 1, str(tmp_path / "marked.txt"): 1}
    with pytest.raises(UserError, match=r"image tokens in its text|a text holds the token that stands for an image"):
        prune(model, tmp_path / "out", data(source, samples=2, length=256), ffn=0.3, force=True)


def test_tokens_without_a_share_do_not_count_as_tokens_a_column(model: Path, tmp_path: Path) -> None:
    """4 windows of 128 tokens of which the answers alone weigh: fewer than the 128 columns."""
    (model / "chat_template.jinja").write_text(sight.TEMPLATE)
    chat = {"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "yes, that is so"}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 8)
    spec, shares = data(tmp_path / "chats.jsonl", samples=4, length=128), {"prompt": 0.0, "answer": 1.0}
    with pytest.raises(
        UserError, match=r"\d\d calibration tokens that weigh something for a Gram matrix of 128 columns"
    ):
        prune(model, tmp_path / "out", spec, ffn=0.3, token_shares=shares)
    prune(model, tmp_path / "out", spec, ffn=0.3, token_shares={"prompt": 1e-320, "answer": 1e-321}, force=True)


def test_padding_does_not_count_as_tokens_a_column(model: Path, chats: Path, tmp_path: Path) -> None:
    """3 windows of 64 tokens are more than the 128 columns of the widest Gram matrix; what is in them is less."""
    path = told(chats.parent, "shots/0.png", "y" * 24)
    path.write_text(path.read_text() * 3)
    with pytest.raises(UserError, match=r"1\d\d calibration tokens besides padding for a Gram matrix of 128 columns"):
        prune(model, tmp_path / "out", data(path, samples=3), ffn=0.3)
    prune(model, tmp_path / "out", data(path, samples=3), ffn=0.3, force=True)
    flags = ["--data", str(path), "--samples", "3", "--length", "64", "--threads", "1", "--no-pictures", "-q"]
    assert main(["sensitivity", str(model), "-o", str(tmp_path / "seen"), *flags]) == 2
    assert not (tmp_path / "seen").exists()


def test_the_analysis_sees_images_as_prune_does(model: Path, chats: Path, tmp_path: Path) -> None:
    """Its costs of the first layer's heads are those that prune ranks by, of the same windows."""
    flags = ["--data", str(chats), "--samples", "5", "--length", "64", "--threads", "1", "-q"]
    assert main(["sensitivity", str(model), "-o", str(tmp_path / "seen"), *flags, "--no-pictures"]) == 0
    seen = load_file(tmp_path / "seen" / "sensitivity.safetensors")
    out = prune(model, tmp_path / "out", data(chats), keep_heads=4, keep_ffn=96)
    scores = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    torch.testing.assert_close(seen["layers.0.heads.cost"], scores["layers.0.heads.cost"], rtol=1e-5, atol=0)
    said = json.loads((tmp_path / "seen" / "sensitivity.json").read_text())
    kinds = said["calibration"]["kinds"]
    assert kinds.keys() == {"padding", "image", "text"} and said["calibration"]["tokens"] == 5 * 64 - kinds["padding"]
    tokens = windows(data(chats), "calibration", model, 0, images=True)
    assert tokens.kinds is not None
    states = [state[torch.from_numpy(tokens.kinds != 0)] for state in stock_states(model, tokens)]
    for layer, before, after in zip(said["layers"], states, states[1:], strict=False):
        influence = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert layer["influence"] == pytest.approx(float(influence), rel=1e-3)
    blind = prune(model, tmp_path / "text", data("builtin"), keep_heads=4)
    text = load_file(blind / "sensitivity" / "1-prune" / "importance.safetensors")
    assert not torch.allclose(text["layers.0.heads.cost"], scores["layers.0.heads.cost"], rtol=0.01)


def test_a_conversation_is_cut_behind_its_last_image_alone(model: Path, chats: Path, tmp_path: Path) -> None:
    spec = data(told(chats.parent, "shots/0.png", "y" * 500), samples=1)
    found = windows(spec, "calibration", model, 0, images=True)
    assert found.kinds is not None and (found.kinds != 0).all()
    parts = [{"type": "text", "text": "z" * 60}, {"type": "image", "image": "shots/0.png"}]
    path = chats.parent / "late.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}) + "\n")
    with pytest.raises(
        UserError, match=r"late.jsonl, line 1: \d+ tokens up to the end of its last image, and a window"
    ):
        windows(data(path, samples=1), "calibration", model, 0, images=True)
