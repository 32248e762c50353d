"""Widths from measured cost curves, on an analysed pico llama: least predicted loss in the budget, told and kept."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compress
from compress.arch import FAMILIES, Sizes
from compress.curves import Curve, Curves, read_curves
from compress.data import DataSpec
from compress.errors import UserError
from compress.machine import Machine
from compress.plan import make_plan
from compress.receipt import load_receipt
from compress.recipe import Recipe
from compress.run import run
from compress.steps.prune.choose import choose
from compress.steps.prune.decoder import Decoder, Layer, by_layer
from compress.steps.prune.options import PruneOptions
from compress.steps.prune.plan import PrunePlan
from tests import tiny

DATA = DataSpec(source="builtin", samples=8, length=64)
MATRICES = 3 * (3 * 96 * 64 + 2 * 64 * 64 + 2 * 16 * 64)
NEURON, HEAD = 3 * 64, 2 * 8 * 64  # parameters of one
FULL = {"ffn": 96, "heads": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("allocation") / "source")


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    out = source.parent / "measured"
    data = {"source": "builtin", "samples": 8, "length": 64}
    compress.measure_sensitivity(source, out, data=data, machine=Machine(1), pictures=False)
    return out


@pytest.fixture(scope="module")
def curves(folder: Path) -> Curves:
    return read_curves(folder)


def recipe(source: Path, folder: Path | None, **options: object) -> Recipe:
    named = {} if folder is None else {"from_sensitivity": str(folder)}
    return Recipe.single("prune", str(source), PruneOptions(**named, **options), data=DATA)


def planned(source: Path, folder: Path | None, **options: object) -> PrunePlan:
    (step,) = make_plan(recipe(source, folder, **options), Machine(1), check_machine=False).steps
    assert isinstance(step, PrunePlan)
    return step


def loss_of(curves: Curves, keeps: list[dict[str, int]]) -> float:
    return sum(curves.curves[i, g].at(FULL[g] - keep[g]) for i, keep in enumerate(keeps) for g in FULL)


def left(keeps: list[dict[str, int]]) -> int:
    return MATRICES - sum((96 - keep["ffn"]) * NEURON + (8 - keep["heads"]) * HEAD for keep in keeps)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_by_layer_it_is_the_best_that_there_is(ratio: float, source: Path, folder: Path, curves: Curves) -> None:
    step = planned(source, folder, ratio=ratio, allocation="per-layer")
    keeps = [dict(keep) for keep in step.keep]
    assert left(keeps) <= (1 - ratio) * MATRICES
    assert all(keep["ffn"] % 8 == 0 and keep["ffn"] >= 24 and keep["heads"] in (2, 4, 6, 8) for keep in keeps)
    assert step.predicted_loss == pytest.approx(loss_of(curves, keeps), rel=1e-9)
    widths = [{"ffn": f, "heads": h} for f in range(24, 97, 8) for h in (2, 4, 6, 8)]
    fits = (
        loss_of(curves, list(three))
        for three in product(widths, repeat=3)
        if left(list(three)) <= (1 - ratio) * MATRICES
    )
    assert step.predicted_loss == pytest.approx(min(fits), rel=1e-9)
    uniform = planned(source, folder, ratio=ratio)
    assert step.predicted_loss <= (uniform.predicted_loss or 0) * (1 + 1e-9) or left(keeps) < left(list(uniform.keep))


def test_widths_are_told_layer_by_layer() -> None:
    keeps = tuple({"ffn": width, "heads": 9} for width in (1536, 1536, 640, 1536))
    assert by_layer(keeps) == ["FFN by layer, from the first: 1,536 x 2, 640, 1,536", "heads: 9 in every layer"]


def test_alike_it_is_the_best_pair(source: Path, folder: Path, curves: Curves) -> None:
    step = planned(source, folder, params=tiny_parameters(source) * 7 // 10)
    (keep,) = {tuple(sorted(keep.items())) for keep in step.keep}
    found = []
    for heads in (2, 4, 6, 8):
        fits = [f for f in (*range(24, 96, 8), 96) if total(source, [{"ffn": f, "heads": heads}] * 3) <= limit(source)]
        found += [(loss_of(curves, [{"ffn": max(fits), "heads": heads}] * 3), heads)] if fits else []
    assert dict(keep)["heads"] == min(found)[1] and len(found) > 1
    assert step.predicted_loss == pytest.approx(min(found)[0], rel=1e-9)
    assert any("the one of least predicted loss" in note for note in step.notes)


def test_a_share_costs_no_more_than_any_pair_that_removes_it(source: Path, folder: Path, curves: Curves) -> None:
    """Widths are multiples of 8: where the nearest removes too little, the next one stands for its number of heads."""
    pairs = [{"ffn": f, "heads": h} for f in range(24, 97, 8) for h in (2, 4, 6, 8)]
    for ratio in (step / 100 for step in range(5, 65)):
        chosen = planned(source, folder, ratio=ratio)
        fits = [loss_of(curves, [pair] * 3) for pair in pairs if left([pair] * 3) <= (1 - ratio) * MATRICES]
        assert chosen.predicted_loss is not None and chosen.removed >= 0.985 * ratio
        assert chosen.predicted_loss <= min(fits) * (1 + 1e-9), ratio


def test_a_larger_size_is_never_planned_to_lose_more(source: Path, folder: Path) -> None:
    found = []
    for params in range(limit(source), tiny_parameters(source) - 1, 900):
        try:
            found.append(planned(source, folder, params=params).predicted_loss)
        except UserError as error:
            assert "is more than 1.5% away" in error.message
    assert len(found) > 10 and found == sorted(found, reverse=True)


def test_what_heads_and_neurons_reach_together_is_reached_or_told(source: Path, folder: Path) -> None:
    def most(heads: int) -> float:
        return 1 - left([{"ffn": 8, "heads": heads}] * 3) / MATRICES

    between = (most(8) + most(2)) / 2  # more than neurons alone make, more than the curves reach
    step = planned(source, folder, ratio=between)
    assert step.keep[0]["heads"] in (2, 4, 6) and 0.985 * between <= step.removed < between + 0.05
    told = f"8 of 96 FFN neurons and 2 of 8 heads, the fewest, make it {most(2):.4f}"
    with pytest.raises(UserError, match=f"0.99 cannot be reached: {told}"):
        planned(source, folder, ratio=0.99)
    with pytest.raises(UserError, match="1,000 cannot be reached: the smallest that 2 heads leave is FFN 8"):
        planned(source, folder, params=1000)
    with pytest.raises(UserError, match=r"0\.001 removes nothing"):
        planned(source, folder, ratio=0.001)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25])
def test_no_pair_is_best_for_removing_less_than_was_asked(ratio: float) -> None:
    """FFN widths are multiples of 256 here: rounding gives some pairs a fifth less to lose."""
    sizes = Sizes(hidden=2048, layers=22, heads=32, kv_heads=4, head_dim=64, ffn=5632, vocab=32000, tied=False)
    layer = Layer(
        sizes, {group.name: group for group in FAMILIES["llama"].groups(sizes, {})}, FAMILIES["llama"].layer(sizes, {})
    )
    decoder = Decoder((layer,) * 22, lambda keeps: (0, 0))

    def curve(units: int, step: int, scale: float) -> Curve:
        gone = np.array([0, *range(step, units, step)])
        return Curve(gone, scale * (gone / units) ** 1.5, gone / units)

    each = {"heads": curve(32, 4, 0.02), "ffn": curve(5632, 256, 0.1)}
    made = SimpleNamespace(curves={(index, name): one for index in range(22) for name, one in each.items()})
    chosen = choose(PruneOptions(ratio=ratio), decoder, made, lambda heads: True, pytest.fail)  # type: ignore[arg-type]
    assert chosen is not None
    assert decoder.removed(chosen[0]) >= 0.985 * ratio * decoder.matrix_parameters


def tiny_parameters(source: Path) -> int:
    return planned(source, None, keep_ffn=96).parameters


def limit(source: Path) -> int:
    return tiny_parameters(source) * 7 // 10


def total(source: Path, keeps: list[dict[str, int]]) -> int:
    return tiny_parameters(source) - MATRICES + left(keeps)


@pytest.mark.parametrize("budget", ["params", "bytes"])
def test_a_size_is_stayed_within(budget: str, source: Path, folder: Path) -> None:
    whole = planned(source, None, keep_ffn=96)
    most = (whole.parameters if budget == "params" else whole.nbytes) * 8 // 10
    step = planned(source, folder, **{budget: most}, allocation="per-layer", protect=["layers.2.mlp"])
    size = step.parameters if budget == "params" else step.nbytes
    assert 0.97 * most < size <= most
    assert step.keep[2]["ffn"] == 96


def test_it_is_written_as_planned_and_the_receipt_says_what_was_predicted(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    step = planned(source, folder, ratio=0.4, allocation="per-layer")
    out = run(recipe(source, folder, ratio=0.4, allocation="per-layer"), tmp_path / "out", Machine(1)).out
    said = load_receipt(out)["steps"][0]
    assert said["predicted_loss"] == step.predicted_loss
    assert said["trust_remote_code"] is True
    assert said["keep"]["ffn"] == [keep["ffn"] for keep in step.keep]
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == said["bytes"]


def test_heads_that_are_given_stay_given(source: Path, folder: Path) -> None:
    step = planned(source, folder, ratio=0.4, keep_heads=None, heads=0.5, allocation="per-layer")
    assert {keep["heads"] for keep in step.keep} == {4}


@pytest.mark.parametrize(
    ("options", "measured", "words"),
    [
        ({"ratio": 0.3}, False, "per-layer needs measured cost curves"),
        ({"ffn": 0.3}, True, "one budget for all layers: ratio, params or bytes; found ffn"),
        ({}, True, "one budget for all layers: ratio, params or bytes; found none"),
        ({"ratio": 0.3, "heads": 0.25, "keep_heads": 4}, True, "'keep_heads' .* and 'heads' .* exclude each other"),
        ({"ratio": 0.8}, True, r"0.8000 cannot be reached: .*the largest is 0.[67]"),
        ({"params": "90M"}, True, "removes nothing"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, object], measured: bool, words: str, source: Path, folder: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        planned(source, folder if measured else None, allocation="per-layer", **options)
    assert "\n" not in caught.value.message
    if not measured:
        assert "autoglm-compress sensitivity" in (caught.value.hint or "")


def test_a_size_that_all_that_may_go_just_meets_is_met(folder: Path, tmp_path: Path) -> None:
    """Biases and file headers count in a size and not in what the matrices lose: the fewest is asked for itself."""
    model = tiny.llama(tmp_path / "biased", attention_bias=True)
    out = tmp_path / "measured"
    compress.measure_sensitivity(
        model, out, data={"source": "builtin", "samples": 8, "length": 64}, machine=Machine(1), pictures=False
    )
    with pytest.raises(UserError, match=r"prune\.pin: stock transformers loads a llama only if its heads divide"):
        planned(model, None, pin={"layers.0.self_attn": 6})
    with pytest.raises(UserError, match="the smallest is") as caught:
        planned(model, out, params=50_000, allocation="per-layer")
    least = int(caught.value.message.rsplit("the smallest is ", 1)[1].split(" ")[0].replace(",", ""))
    assert planned(model, out, params=least, allocation="per-layer").parameters == least


def test_bytes_are_those_of_what_may_go_where_dtypes_are_mixed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny.llama(tmp_path / "mixed", vocab_size=4096)
    file = model / "model.safetensors"
    tensors = {n: t.bfloat16() if "embed" in n or "lm_head" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "measured"
    compress.measure_sensitivity(
        model, out, data={"source": "builtin", "samples": 8, "length": 64}, machine=Machine(1), pictures=False
    )
    whole = planned(model, None, keep_ffn=96).nbytes
    most = whole - 60_000
    step = planned(model, out, bytes=most, allocation="per-layer")
    neuron_step = 8 * NEURON * 4  # bytes of the smallest cut
    assert most - 2 * neuron_step < step.nbytes <= most
