"""Properties of fewer KV heads, through the front door: what can be undone costs nothing, the refit is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.arch import family_of
from compress.arch.rope import INTERLEAVED, rotary_rows
from compress.checkpoint.headers import read_header
from compress.checkpoint.ledger import Ledger
from compress.cli import main
from compress.data import DataSpec, windows
from compress.errors import UserError
from compress.machine import Machine
from compress.steps.prune.kv import common_head
from tests import tiny
from tests.invariants.test_prune import DATA, prune
from tests.invariants.test_run import contents
from tests.matrix import LOADED
from tests.stock import load, logits

MANY = DataSpec(source="builtin", samples=12, length=64)
IDS = {"input_ids": torch.arange(40)[None]}
Turn = Callable[[torch.Tensor], torch.Tensor]


def rewritten(folder: Path, change: Callable[[int, dict[str, torch.Tensor]], None]) -> Path:
    """`folder` with every decoder layer's tensors changed in place by `change(index, tensors)`."""
    tensors, header = load_file(folder / "model.safetensors"), read_header(folder)
    family = family_of(header)
    for index in range(family.sizes(header).layers):
        prefix = family.prefix(index)
        layer = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        change(index, layer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def key_and_value(layer: dict[str, torch.Tensor], heads: int, width: int) -> list[list[torch.Tensor]]:
    """Views of the rows that make keys, and of those that make values: weights, then biases."""
    if "self_attn.qkv_proj.weight" in layer:
        rows = layer["self_attn.qkv_proj.weight"]
        return [[rows[heads * width : -2 * width]], [rows[-2 * width :]]]  # two KV heads
    names = [f"self_attn.{each}_proj" for each in "kv"]
    return [[layer[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in layer] for name in names]


def copied(folder: Path, turned: bool) -> Path:
    """The model with KV head 1 a copy of KV head 0; turned: by whatever the rotation lets pass for keys, by any matrix
    for values. Another model, but one in which the two heads can be one."""
    header = read_header(folder)
    family = family_of(header)
    sizes, generator = family.sizes(header), torch.Generator().manual_seed(5)
    d, still = sizes.head_dim, header.text_config.get("no_rope_layers")

    def change(index: int, layer: dict[str, torch.Tensor]) -> None:
        keys, values = torch.eye(d), torch.eye(d)
        if turned:
            values = torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator)
            moves = still is None or still[index]
            rotary = rotary_rows(sizes, header.text_config, family.rotary) if moves else 0
            if "self_attn.k_norm.weight" not in layer:
                keys = allowed(d, rotary, family.rope, generator)
        k, v = key_and_value(layer, sizes.heads, d)
        for parts, turn in ((k, keys), (v, values)):
            for part in parts:
                part[d : 2 * d] = turn @ part[:d]

    return rewritten(folder, change)


def allowed(d: int, rotary: int, rope: str, generator: torch.Generator) -> torch.Tensor:
    """A matrix [d, d] that commutes with every rotation of a head: a turn and a scale a pair, anything on the rest."""
    turn = torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator)
    turn[:rotary] = 0
    turn[:, :rotary] = 0
    for pair in range(rotary // 2):
        a, b = (2 * pair, 2 * pair + 1) if rope == INTERLEAVED else (pair, pair + rotary // 2)
        x, y = torch.randn(2, generator=generator) + torch.tensor([1.0, 0.0])
        turn[a, a] = turn[b, b] = x
        turn[a, b], turn[b, a] = -y, y
    return turn


def source_of(family: str, folder: Path, **sizes: Any) -> Path:
    return Path(getattr(tiny, family)(folder, **sizes))


@pytest.mark.parametrize("family", LOADED)
def test_heads_that_differ_by_what_can_be_undone_become_one_without_loss(family: str, tmp_path: Path) -> None:
    """The derivation of `aligned`, for every order of rotary rows, partial rotation, biases, fused projections, layers
    that do not rotate and norms over keys."""
    source = copied(source_of(family, tmp_path / "source"), turned=True)
    out = prune(source, tmp_path / "out", keep_kv_heads=1, refit=False, force=True)
    small, whole = load(out), load(source)
    assert read_header(out).text_config["num_key_value_heads"] == 1
    torch.testing.assert_close(logits(small, IDS), logits(whole, IDS), rtol=2e-3, atol=2e-3)
    # averaging does not undo it
    plain = prune(source, tmp_path / "plain", keep_kv_heads=1, kv_merge="mean", refit=False, force=True)
    assert not torch.allclose(logits(load(plain), IDS), logits(whole, IDS), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_share_of_rotary_rows_that_the_config_leaves_out_is_that_of_the_stock_class(
    family: str, tmp_path: Path
) -> None:
    source = copied(source_of(family, tmp_path / "source"), turned=True)
    config = json.loads((source / "config.json").read_text())
    assert config.pop("rope_parameters")["partial_rotary_factor"] == 0.5
    (source / "config.json").write_text(json.dumps(config))
    out = prune(source, tmp_path / "out", keep_kv_heads=1, refit=False, force=True)
    torch.testing.assert_close(logits(load(out), IDS), logits(load(source), IDS), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["glm", "phi3"])
def test_an_odd_number_of_rotary_rows_takes_one_row_more(family: str, tmp_path: Path) -> None:
    """As the stock classes do, for which half of 10 rows is 6 of them."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    sizes |= {"head_dim": 10} if family == "glm" else {}
    source = copied(source_of(family, tmp_path / "source", **sizes), turned=True)
    out = prune(source, tmp_path / "out", keep_kv_heads=1, refit=False, force=True)
    torch.testing.assert_close(logits(load(out), IDS), logits(load(source), IDS), rtol=2e-3, atol=2e-3)


def test_a_cache_takes_the_count_that_the_stock_class_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Biases keep a llama from being a mistral, so heads must divide hidden_size: 5 of 8 do not."""
    sizes = {"num_key_value_heads": 8, "num_attention_heads": 8, "attention_bias": True}
    source = source_of("llama", tmp_path / "source", **sizes)
    line = ["prune", str(source), "-o", str(tmp_path / "out"), "--kv-merge", "drop", "--dry-run", "--json"]
    assert main([*line, "--kv-cache-bytes", "1000"]) == 0
    notes = " ".join(json.loads(capsys.readouterr().out)["steps"][0]["notes"])
    assert "4 KV heads: 768 bytes a token, the most that fit; the next is 8 KV heads" in notes
    assert main([*line, "--keep-kv-heads", "5"]) == 2
    assert "5 does not divide 64; mistral" in capsys.readouterr().err


def test_the_plan_knows_what_merging_many_wide_heads_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Carried out, on one thread, it took 518 MiB more than before it."""
    sizes = {"hidden_size": 96, "num_attention_heads": 48, "num_key_value_heads": 48, "head_dim": 64}
    source = source_of("llama", tmp_path / "source", **sizes)
    line = ["prune", str(source), "-o", str(tmp_path / "out"), "--keep-kv-heads", "1", "--dry-run", "--json"]
    assert main([*line, "--samples", "16", "--length", "64", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] > 518 * 2**20


def test_the_mean_of_equal_heads_is_the_head(tmp_path: Path) -> None:
    source = copied(tiny.phi3(tmp_path / "source"), turned=False)
    out = prune(source, tmp_path / "out", keep_kv_heads=1, kv_merge="mean", refit=False)
    torch.testing.assert_close(logits(load(out), IDS), logits(load(source), IDS), rtol=1e-5, atol=1e-5)


def test_mean_is_the_average_of_neighbours(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", num_key_value_heads=4)
    out = prune(source, tmp_path / "out", keep_kv_heads=2, kv_merge="mean", refit=False)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name, value in before.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            torch.testing.assert_close(after[name], value.view(2, 2, 8, 64).mean(1).flatten(0, 1))
        else:
            assert torch.equal(after[name], value), name


@pytest.mark.parametrize("method", ["mean", "aligned"])
def test_the_refit_is_the_ridge_towards_the_original_output(method: str, tmp_path: Path) -> None:
    """Layer 0, whose input is the same in both: numpy's solution from stock models, with heads cut as well."""
    source = tiny.llama(tmp_path / "source", attention_bias=True, num_attention_heads=8)
    cuts: dict[str, Any] = {"keep_kv_heads": 1, "kv_merge": method, "keep_heads": 4}
    plain = prune(source, tmp_path / "plain", refit=False, **cuts)
    out = prune(source, tmp_path / "out", damping=0.02, **cuts)
    ids = {"input_ids": torch.from_numpy(windows(DATA, "calibration", source, 0).ids)}
    wanted, _ = seen_by_o_proj(source, ids)
    _, inputs = seen_by_o_proj(plain, ids)
    o_proj = load(plain).model.layers[0].self_attn.o_proj
    weight, bias = o_proj.weight.detach().double(), o_proj.bias.detach().double()
    gram = inputs.T @ inputs / len(inputs)
    ridge = 0.02 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    expected = ((wanted - bias).T @ inputs / len(inputs) + weight @ ridge) @ torch.linalg.inv(gram + ridge)
    found = load_file(out / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, weight, rtol=1e-2, atol=1e-2)
    told = compress.load_receipt(out)["steps"][0]["kv_merge"]["errors"]["0"]
    rest = ((inputs @ expected.T + bias - wanted).square().sum() / (wanted - bias).square().sum()).item()
    assert told["error"] == pytest.approx(rest, rel=1e-3) and told["error"] < told["error_without_refit"]


def seen_by_o_proj(folder: Path, ids: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What o_proj of layer 0 gives and reads [tokens, n], in float64."""
    model, seen = load(folder), []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: seen.append((out, args[0])))
    logits(model, ids)
    out, read = seen[0]
    return out.flatten(0, 1).double(), read.flatten(0, 1).double()


def test_aligned_heads_stand_better_for_the_old_ones_than_their_mean(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source")
    errors = {}
    for method in ("mean", "aligned"):
        out = prune(source, tmp_path / method, keep_kv_heads=1, kv_merge=method)
        errors[method] = compress.load_receipt(out)["steps"][0]["kv_merge"]["errors"]
    for layer, aligned in errors["aligned"].items():
        assert aligned["error"] < errors["mean"][layer]["error"]
        assert aligned["error_without_refit"] < errors["mean"][layer]["error_without_refit"]


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_no_other_common_head_is_nearer(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 3, 4, generator=generator, dtype=kind)  # 3 heads of width 4
    lower = torch.randn(3, 4, 4, generator=generator, dtype=kind)
    weights = lower @ lower.mH
    gram = torch.einsum("tga,thb->gahb", z.conj(), z)
    taken, given = common_head(weights, gram)

    def loss(taken: torch.Tensor) -> float:
        made = torch.einsum("cga,tga->tc", taken, z)
        factors = torch.linalg.cholesky(weights)
        total = 0.0
        for head in range(3):  # each head got back from `made` as well as it can be
            target = z[:, head] @ factors[head]
            back = torch.linalg.lstsq(made, target).solution
            total += float((target - made @ back).abs().square().sum())
        return total

    best = loss(taken)
    made = torch.einsum("cga,tga->tc", taken, z)
    back = sum(
        float(((z[:, head] - made @ given[head].mT) @ torch.linalg.cholesky(weights)[head]).abs().square().sum())
        for head in range(3)
    )
    assert back == pytest.approx(best, rel=1e-4)  # `given` is how they are best got back
    for trial in range(5):
        other = torch.randn(taken.shape, generator=torch.Generator().manual_seed(trial), dtype=kind)
        assert best <= loss(taken + 0.05 * other) + 1e-9 and best < loss(other)


def test_all_cuts_at_once(tmp_path: Path) -> None:
    """Layers, KV heads, query heads and FFN; the run checks the result against stock transformers."""
    source = tiny.glm4v(tmp_path / "source", num_hidden_layers=4)
    out = prune(source, tmp_path / "out", keep_layers=3, keep_kv_heads=1, heads=0.25, ratio=0.5)
    step, text = compress.load_receipt(out)["steps"][0], read_header(out).text_config
    assert step["keep"]["kv_heads"] == text["num_key_value_heads"] == 1 and text["num_attention_heads"] == 6
    assert text["num_hidden_layers"] == 3 and abs(step["removed"] - 0.5) < 0.02
    tensors = load_file(out / "model.safetensors")
    assert step["parameters"] == sum(value.numel() for value in tensors.values())
    assert tensors["model.language_model.layers.2.self_attn.k_proj.weight"].shape == (8, 64)


def test_dropped_heads_are_those_that_cost_least_together(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", num_key_value_heads=4)
    out = prune(source, tmp_path / "out", keep_kv_heads=2, kv_merge="drop", keep_heads=2)
    scores = load_file(out / "sensitivity" / "1-prune" / "importance.safetensors")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for index in range(3):
        cost, keep = scores[f"layers.{index}.heads.cost"].view(4, 2), scores[f"layers.{index}.heads.keep"]
        left = sorted(cost.sum(1).argsort()[2:].tolist())
        assert (keep // 2).tolist() == left and (keep % 2).tolist() == cost[left].argmax(1).tolist()
        for name in ("k_proj", "v_proj"):
            rows = before[f"model.layers.{index}.self_attn.{name}.weight"].view(4, 8, 64)[left]
            assert torch.equal(after[f"model.layers.{index}.self_attn.{name}.weight"], rows.flatten(0, 1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_kv_heads": 3}, "3 of 4 KV heads cannot stay; aligned joins as many into each; fewer that can: 1, 2"),
        ({"keep_kv_heads": 5, "kv_merge": "drop"}, "5 of 4 KV heads cannot stay; fewer that can: 1, 2, 3"),
        (
            {"keep_kv_heads": 2, "kv_merge": "drop", "keep_heads": 6},
            "6 heads cannot stay: the KV heads that stay have 4",
        ),
        ({"keep_kv_heads": 2, "keep_heads": 6}, "6 heads cannot stay: the model has 8"),
        ({"keep_kv_heads": 2, "protect": ["layers.0.mlp"]}, "not where layers differ in width"),
        ({"keep_kv_heads": 2, "ratio": 0.01}, "the KV heads alone remove 0.0667"),
        ({"kv_cache_bytes": 191}, "191 cannot be reached: the smallest is 1 KV head: 192 bytes a token"),
        ({"kv_cache_bytes": 768}, "768 removes nothing: the model stays within it as it is .4 KV heads: 768 bytes a"),
        ({"kv_cache_bytes": 400, "keep_kv_heads": 2}, "'kv_cache_bytes' and 'keep_kv_heads' exclude each other"),
        ({"kv_cache_bytes": 400, "pin": {"layers.0.mlp": 8}}, "kv_cache_bytes: not where layers differ in width"),
        ({"keep_kv_heads": 2, "kv_merge": "means"}, "unknown way to merge KV heads 'means'; did you mean 'mean'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "source", num_key_value_heads=4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(source), "steps": [{"prune": options}]}))
    with pytest.raises(UserError, match=said):
        compress.plan(recipe, machine=Machine(1))


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"kv_cache_bytes": 767}, 2),  # merged: a divisor of 4
        ({"kv_cache_bytes": 767, "kv_merge": "drop"}, 3),
        ({"kv_cache_bytes": "0.375KiB"}, 2),
        ({"kv_cache_bytes": 383}, 1),
        ({"kv_cache_bytes": 383, "keep_layers": 1}, 4),  # the layers that stay alone have a cache
        ({"kv_cache_bytes": 255, "keep_layers": 1}, 2),
    ],
)
def test_a_cache_target_takes_the_most_heads_that_fit(options: dict[str, Any], heads: int, tmp_path: Path) -> None:
    """4 KV heads of 8 in 3 layers, keys and values in float32: 768 bytes a token."""
    source = tiny.llama(tmp_path / "source", num_key_value_heads=4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(source), "steps": [{"prune": options}]}))
    plan = compress.plan(recipe, machine=Machine(1))
    before, after = plan.kv_cache
    layers = options.get("keep_layers", 3)
    assert (before, after) == (768, 2 * layers * heads * 8 * 4)
    assert plan.steps[0].after.config["num_key_value_heads"] == heads
    assert any("bytes a token, the most that fit" in note for note in plan.steps[0].notes)


def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.llama(tmp_path / "source")
    line = ["prune", str(source), "--keep-kv-heads", "1", "--samples", "12", "--length", "64", "--threads", "1", "-q"]

    def finish(name: str, code: int = 0) -> dict[str, bytes]:
        assert main([*line, "--checkpoint-every", "0", "-o", str(tmp_path / name)]) == code
        return {} if code else {k: v for k, v in contents(tmp_path / name).items() if k != "measured.json"}

    whole, real, calls = finish("whole"), Ledger.save, []

    def second(self: Ledger, *state: object) -> None:
        real(self, *state)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "save", second)
        finish("out", code=130)
    assert finish("out") == whole
