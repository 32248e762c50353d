"""Layer budgets by hand, through plans: which modules a pattern takes, what is counted, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import compress
from compress.arch import family_of
from compress.machine import Machine
from compress.steps.prune.plan import PrunePlan
from tests import sparse, tiny
from tests.unit.test_plan import matrices, planned, refusal


def pruned(model: Path, options: str) -> PrunePlan:
    (step,) = planned(model, f"prune: {{{options}}}").steps
    assert isinstance(step, PrunePlan)
    return step


def whole(step: PrunePlan, group: str) -> list[int]:
    """The layers in which nothing of a group goes."""
    full = {"ffn": 1536, "heads": 9}[group]
    return [index for index, keep in enumerate(step.keep) if keep[group] == full]


@pytest.mark.parametrize(
    ("pattern", "ffn", "heads"),
    [
        ("layers.1.*", [1], [1]),
        ("layers.1", [1], [1]),
        ("layers.11.mlp", [11], []),
        ("layers.0-3.*", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("layers.2?.self_attn", [], list(range(20, 30))),
        ("layers.*.mlp", list(range(30)), []),
        ("layers.1*.mlp", [1, *range(10, 20)], []),
        ("layers.[05].m*", [0, 5], []),
    ],
)
def test_a_pattern_takes_what_it_names(pattern: str, ffn: list[int], heads: list[int], tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model")
    step = pruned(model, f"heads: 0.34, ffn: 0.5, protect: ['{pattern}']")
    assert (whole(step, "ffn"), whole(step, "heads")) == (ffn, heads)
    count = len(ffn) + len(heads)
    told = f"protect '{pattern}': {count} modules not cut" if count > 1 else f"protect '{pattern}': 1 module not cut"
    assert told in step.notes


def test_pinned_widths_are_exact_and_the_ratio_is_the_whole(tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model")
    step = pruned(model, 'ratio: 0.3, pin: {layers.5.mlp: 1001, "layers.2?.self_attn": 6}, protect: "layers.11.mlp"')
    assert step.keep[5]["ffn"] == 1001 and step.keep[11]["ffn"] == 1536
    assert [keep["heads"] for keep in step.keep] == [9] * 20 + [6] * 10
    free = {keep["ffn"] for index, keep in enumerate(step.keep) if index not in (5, 11)}
    assert len(free) == 1 and next(iter(free)) % 8 == 0
    assert step.removed == pytest.approx(1 - matrices(step.after) / matrices(step.before), rel=1e-12)
    assert abs(step.removed - 0.3) < 0.003
    sizes = family_of(step.after).layers(step.after)
    assert [(each.heads, each.ffn) for each in sizes] == [(keep["heads"], keep["ffn"]) for keep in step.keep]
    assert step.after.config["architectures"] == ["PerLayerLlamaForCausalLM"]
    assert any("needs trust_remote_code" in note for note in step.notes)
    (alike,) = free
    told = f"FFN by layer, from the first: {alike:,} x 5, 1,001, {alike:,} x 5, 1,536, {alike:,} x 18"
    assert told in step.notes and "heads by layer, from the first: 9 x 20, 6 x 10" in step.notes


def test_a_target_is_met_with_what_is_fixed(tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model")
    step = pruned(model, "params: 110M, protect: [layers.0-1, layers.29.mlp]")
    assert 0.985 * 110e6 <= step.parameters <= 110e6
    assert whole(step, "ffn") == [0, 1, 29]


def test_what_makes_no_layer_differ_stays_stock(tmp_path: Path) -> None:
    step = pruned(sparse.llama(tmp_path / "model"), "ffn: 0.5, protect: ['layers.*.self_attn']")
    assert step.after.config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "ffn: 0.5, protect: [layers.1.mpl]",
            "protect: 'layers.1.mpl' matches no module; did you mean 'layers.1.mlp'?",
        ),
        ("ffn: 0.5, protect: [layers.30.mlp]", "protect: 'layers.30.mlp' matches no module"),
        ("ffn: 0.5, protect: [model.layers.1.mlp]", "'model.layers.1.mlp' matches no module"),
        ("ffn: 0.5, protect: [layers.40-50.mlp]", "'layers.40-50.mlp': the model has layers 0 to 29"),
        ("ffn: 0.5, protect: [layers.20-30.mlp]", "'layers.20-30.mlp': the model has layers 0 to 29"),
        ("pin: {layers.5.mlp: 1600}", "pin: 'layers.5.mlp': 1600 neurons cannot stay: the module has 1536"),
        ("pin: {layers.5.self_attn: 7}", "7 heads cannot stay: every one of 3 KV heads keeps equally many"),
        ("pin: {'layers.5.*': 6, layers.5.mlp: 600}", "'layers.5.mlp' and pin 'layers.5.*' say different widths"),
        ("pin: {layers.5.mlp: 600}, protect: [layers.5]", "'layers.5.mlp' and protect 'layers.5' say different widths"),
        (
            "pin: {layers.4.mlp: 9, layers.5.mlp: 0}",
            "the width of 'layers.5.mlp' is 0, allowed: a whole number above 0",
        ),
        ("pin: layers.5.mlp=1.5", "the width of 'layers.5.mlp' is '1.5', allowed: a whole number above 0"),
        ("pin: layers.5.mlp", "allowed: a map of patterns to widths"),
        ("pin: =5", "allowed: a map of patterns to widths"),
        ("protect: [layers.5.mlp]", "nothing to prune"),
        ("ratio: 0.6, protect: ['layers.0-20.*']", "0.6 cannot be reached: all that protect and pin leave free makes"),
        ("ratio: 0.05, heads: 0.34, protect: [layers.5.mlp]", "ratio: the heads alone remove 0.06"),
        ("ratio: 0.05, pin: {'layers.*.mlp': 800}", "ratio: the pinned widths alone remove 0.3"),
    ],
)
def test_what_cannot_be_is_refused(options: str, said: str, tmp_path: Path) -> None:
    assert any(said in line for line in refusal(sparse.llama(tmp_path / "model"), f"prune: {{{options}}}"))


@pytest.mark.parametrize("above", [0.9, 0.05])
def test_the_bound_that_a_refusal_names_can_be_asked_for(above: float, tmp_path: Path) -> None:
    model, given = sparse.llama(tmp_path / "model"), "protect: ['layers.0-20.*'], heads: 0.34"
    (said,) = refusal(model, f"prune: {{{given}, ratio: {0.5 if above == 0.9 else 0.01}}}")
    bound = re.search(r"(?:makes|alone remove) (0\.\d{4})", said)
    assert bound is not None
    assert planned(model, f"prune: {{{given}, ratio: {bound[1]}}}")


def test_layers_that_what_is_fixed_leaves_little_of_are_told(tmp_path: Path) -> None:
    model = sparse.llama(tmp_path / "model")
    said = "what is fixed by hand leaves 168 of 1,536 FFN neurons to layer 21: expect a poor result"
    for ratio, told in ((0.2, True), (0.15, False)):
        step = pruned(model, f"ratio: {ratio}, protect: ['layers.0-20.*']")
        assert (said in step.notes) == told and any("poor" in note for note in step.notes) == told, step.notes


def test_a_share_that_narrow_layers_keep_out_of_reach_is_refused(tmp_path: Path) -> None:
    """What one multiple leaves of narrow layers counts: all of them at one multiple make less than was asked."""
    narrow = tmp_path / "narrow"
    data = {"source": "builtin", "samples": 8, "length": 64}
    pins = {"layers.1-2.mlp": 12}
    compress.prune(tiny.llama(tmp_path / "model"), narrow, pin=pins, data=data, machine=Machine(1), refit=False)
    (said,) = refusal(narrow, "prune: {ratio: 0.5}")
    assert "0.5 cannot be reached: 8 of 96 FFN neurons, the fewest, make it 0." in said
