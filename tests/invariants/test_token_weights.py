"""Token weights through the front door: what they change, what they must not, and every refusal at plan time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.data import DataSpec
from compress.errors import UserError
from compress.machine import Machine
from compress.plan import make_plan
from compress.receipt import load_receipt
from compress.recipe import Recipe
from compress.run import run
from compress.steps.prune.options import PruneOptions
from tests import tiny
from tests.unit.test_data_kinds import PLAIN

CUT = {"keep_ffn": 60, "keep_heads": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.llama(tmp_path_factory.mktemp("weights") / "pico")
    (made / "chat_template.jinja").write_text(PLAIN)
    return made


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of letters, answers of digits."""
    path = tmp_path_factory.mktemp("weights") / "chats.jsonl"
    said = [("abcdefghij klmnop qrst uvwxyz " * 3)[i:] for i in range(20)]
    told = [str(7**i) for i in range(20)]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}) + "\n"
            for a, b in zip(said, told, strict=True)
        )
    )
    return path


def prune(model: Path, out: Path, source: str, **options: Any) -> Path:
    data = DataSpec(source=source, samples=8, length=64)
    return run(Recipe.single("prune", str(model), PruneOptions(**{**CUT, **options}), data=data), out, Machine(1)).out


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{"token_weights": "norm"}, {"token_shares": {"prompt": 1, "answer": 3}}])
def test_weights_change_the_result_and_a_rerun_does_not(
    options: dict[str, Any], model: Path, chats: Path, tmp_path: Path
) -> None:
    plain = prune(model, tmp_path / "plain", str(chats))
    first, again = (prune(model, tmp_path / name, str(chats), **options) for name in ("a", "b"))
    assert same(first, again) and not same(first, plain)
    assert (first / "receipt.json").read_bytes() == (again / "receipt.json").read_bytes()


def test_natural_shares_are_no_weights_at_all(model: Path, chats: Path, tmp_path: Path) -> None:
    """Each kind with the share that it has anyway: the same statistics, but for rounding."""
    plain = prune(model, tmp_path / "plain", str(chats))
    counted = prune(model, tmp_path / "counted", str(chats), token_shares={"prompt": 1, "answer": 1})
    kinds = load_receipt(counted)["steps"][0]["calibration"]["kinds"]
    assert sum(kinds.values()) == 8 * 64 and kinds.keys() == {"prompt", "answer"}
    assert "kinds" not in load_receipt(plain)["steps"][0]["calibration"]
    natural = prune(model, tmp_path / "natural", str(chats), token_shares=kinds)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights_of(natural)[name], value, rtol=1e-3, atol=1e-4)
    assert not same(counted, plain)


def test_the_refit_serves_the_kind_that_has_the_weight(model: Path, chats: Path, tmp_path: Path) -> None:
    """An error is that of the weighted tokens, so where few kinds are left to serve, it is lower."""

    def error(name: str, **options: Any) -> float:
        out = prune(model, tmp_path / name, str(chats), criterion="magnitude", **options)
        layer = load_receipt(out)["steps"][0]["relative_output_error"][0]["ffn"]
        assert layer["error"] < layer["error_without_refit"]
        return float(layer["error"])

    both, answers = error("both"), error("answers", token_shares={"prompt": 0, "answer": 1}, force=True)
    assert answers < both, "fewer tokens to serve: digits alone"


def test_kv_heads_merge_and_damping_is_chosen_with_weights(model: Path, chats: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_heads": None, "keep_kv_heads": 1, "held_out": 0.25}
    plain = prune(model, tmp_path / "plain", str(chats), **options)
    found = prune(model, tmp_path / "found", str(chats), **options, token_shares={"prompt": 1, "answer": 9})
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(weights_of(plain)[name], weights_of(found)[name])


def refusal(model: Path, source: str, **options: Any) -> str:
    data = DataSpec(source=source, samples=8, length=64)
    recipe = Recipe.single("prune", str(model), PruneOptions(**CUT, **options), data=data)
    with pytest.raises(UserError) as caught:
        make_plan(recipe, Machine(1), where=None)
    return caught.value.message


def alone(model: Path, **options: Any) -> str:
    """What is said where whole layers go, or what else is named, and nothing besides."""
    recipe = Recipe.single("prune", str(model), PruneOptions(**{"keep_layers": 2} | options))
    with pytest.raises(UserError) as caught:
        make_plan(recipe, Machine(1), where=None)
    return caught.value.message


def test_kinds_that_do_not_occur_or_are_not_named_are_refused(model: Path, chats: Path) -> None:
    assert "have no answer tokens, but text" in refusal(model, "builtin", token_shares={"text": 1, "answer": 1})
    assert "have prompt tokens, whose share is not told" in refusal(model, str(chats), token_shares={"answer": 1})
    said = refusal(model, "builtin", token_weights="norm", criterion="random", refit=False)
    assert said.startswith("--token-weights: weighs nothing: random without refit")
    said = alone(model, keep_layers=None, keep_kv_heads=1, kv_merge="mean", refit=False, token_weights="norm")
    assert said.startswith("--token-weights: weighs nothing: kv_merge: mean without refit")
    assert alone(model, token_weights="norm").startswith("--token-weights: weighs nothing: no units go")
    assert alone(model, token_shares={"text": 1}).startswith("--token-shares: weighs nothing: no units go")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("prompt=1,answers=2", "unknown kind of token 'answers'; did you mean 'answer'?"),
        ("prompt=1,prompt=2", "prompt stands twice"),
        ("prompt", "allowed: a map of kinds to shares"),
        ({"prompt": -1}, "the share of prompt is -1, allowed: a number, 0 or above"),
        ({"prompt": True}, "the share of prompt is True"),
        ("prompt=0", "where nothing has a share"),
        ({"padding": 1}, "unknown kind of token 'padding'"),
    ],
)
def test_wrong_shares_are_one_line(given: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        PruneOptions(ffn=0.5, token_shares=given)
    assert said in str(caught.value)


def test_shares_are_read_from_text() -> None:
    assert PruneOptions(ffn=0.5, token_shares="prompt=0.3, answer=.7").token_shares == {"prompt": 0.3, "answer": 0.7}
