"""What the measurements in bench/ rest on: the paired difference, and the judge's windows."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts' folder on the path, as for a script that is started; their modules go again."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


def test_a_paired_difference_by_hand() -> None:
    from _paired import paired

    # differences 3, -1, 2, 0: mean 1, variance (4 + 4 + 1 + 1) / 3, standard error sqrt(10 / 3 / 4)
    found = paired([13.0, 19.0, 7.0, 1.0], [10.0, 20.0, 5.0, 1.0])
    assert found.mean == 1.0
    assert found.error == pytest.approx(math.sqrt(10 / 12))
    assert found.noise
    assert str(found) == "+1.00e+00 +- 9.1e-01 nats a token over 4 windows, within noise"
    # differences 1, 2, 3, 2: mean 2, standard error sqrt(2 / 3 / 4); its sign does not matter
    for sign in (1, -1):
        found = paired([sign * 1.0, sign * 2.0, sign * 3.0, sign * 2.0], [0.0] * 4)
        assert (found.mean, found.error) == (sign * 2.0, pytest.approx(math.sqrt(1 / 6)))
        assert not found.noise
    assert paired([1.0, 2.0], [1.0, 2.0]).noise  # the same bytes


@pytest.mark.parametrize("other", [[1.0], [1.0, 2.0, 3.0]])
def test_windows_that_are_no_pairs(other: list[float]) -> None:
    from _paired import paired

    with pytest.raises(ValueError):
        paired([1.0, 2.0][: max(1, len(other) - 1)], other)


def test_the_judges_windows_are_its_means(tmp_path: Path) -> None:
    import torch
    from judge import judge, load

    from tests import tiny

    model, other = load(tiny.llama(tmp_path / "a", seed=0)), load(tiny.llama(tmp_path / "b", seed=1))
    rows = torch.randint(0, 100, (6, 16), generator=torch.Generator().manual_seed(0))  # more than one batch
    found = judge(model, rows, other)
    assert len(found["window_nll"]) == len(found["window_kl"]) == 6
    assert math.log(found["ppl"]) == pytest.approx(sum(found["window_nll"]) / 6, abs=1e-6)
    assert found["kl"] == pytest.approx(sum(found["window_kl"]) / 6, abs=1e-6)
    assert found["kl"] > 1e-3
    alone = judge(model, rows[3:4])
    assert alone["window_nll"] == [pytest.approx(found["window_nll"][3], abs=1e-5)]
    assert "window_kl" not in alone


def test_a_peers_verdict_names_the_noise() -> None:
    from _foundation_sections import peers_quant

    def row(name: str, nll: list[float] | None) -> dict[str, object]:
        numbers = {"ppl": 20.0, "ratio": 1.0, "kl": 0.1, "top1": 0.9, "peak": 2**30, "bytes": 1, "seconds": 1.0}
        windows = {} if nll is None else {"window_nll": nll, "window_kl": [0.1, 0.1]}
        return {"key": {"row": name, "model": "m"}, "found": {**numbers, **windows, "judged": "stock", "threads": 1}}

    ours, same = row("ours-w8a16", [3.0, 3.2]), row("auto-round-w8a16", [3.0, 3.2])
    old, worse = row("modelopt-int8-weight-only", None), row("llm-compressor-w8a16", [2.0, 2.2])
    lines = [line for line in peers_quant([ours, same, old, worse]).splitlines() if line.startswith("- perplexity")]
    ends = ["beyond noise", "within noise", "met"]
    assert [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 3, lines


def test_the_rows_of_the_ablation_and_of_the_tables_have_names() -> None:
    from _pruning_sections import ABLATION, CALIBRATED, METHODS, SHAPES
    from pruning import CALIBRATIONS, CHANGED, OURS, PEERS, PER_LAYER, SIZES, arguments, asked

    assert METHODS.keys() == OURS.keys() | PER_LAYER.keys() | PEERS.keys() | CHANGED.keys()
    given = arguments(["--calibrations", *CALIBRATIONS, "--ratios", "0.2", "0.35", "0.5", "--seeds", "0", "1", "2"])
    cases = {case for _, case in asked(given)}
    for method in METHODS.keys() - CHANGED.keys():
        own = {(case.calibration, case.ratio, case.seed) for case in cases if case.method == method}
        assert own == {(c, ratio, seed) for c in CALIBRATED for ratio in (0.2, 0.35, 0.5) for seed in range(3)}
    assert {case.shape for case in cases} == SHAPES.keys()
    rows = [(case.method, setting.samples) for setting, case in asked(arguments(["--ablation"]))]
    shown = [each for changes in ABLATION.values() for each in changes]
    assert sorted(rows) == sorted([("wanda", 128), *(("wanda", n) if n in SIZES else (n, 128) for n in shown)])


def test_seeds_are_shown_with_their_spread_and_no_far_text_is_left_out() -> None:
    from _far_texts import FAR_TEXTS
    from _pruning_sections import pruning

    texts = ("wikitext", *FAR_TEXTS)
    setting = {"model": "m", "samples": 128, "length": 512, "windows": 64}

    def row(seed: int, ratios: dict[str, float]) -> dict[str, object]:
        key = {"method": "wanda", "calibration": "self+wikitext", "shape": "ffn", "ratio": 0.2, "seed": seed}
        machine = {"cpu": "c", "cores": 1, "memory": 0}
        return {"key": key | setting, "found": {"ratio": ratios}, "machine": machine}

    page = pruning([row(seed, dict.fromkeys(texts, 1.5 + seed / 10) | {"code": 1.9}) for seed in range(3)])
    assert "| 1.600 (1.500 to 1.700; 3 seeds) |" in page
    (asked,) = [line for line in page.splitlines() if "1.57; far 1.55" in line]
    missed = " **missed** | ".join(["1.600"] * len(FAR_TEXTS))
    assert asked.endswith(f"| {missed} **missed** | 1.900 **missed** |")
    carried = next(line for line in page.splitlines() if "| 1.2 |" in line)
    assert carried.endswith("| 1.000 | 1.000 | 1.000 | 1.191 |")
    # a row of fewer texts is in a table of its own
    assert pruning([row(0, dict.fromkeys(texts, 1.0)), row(1, {"wikitext": 1.0})]).count("Dense perplexity") == 2


def test_questions_that_are_none_are_named_by_line(tmp_path: Path) -> None:
    from multiple_choice import questions

    file = tmp_path / "asked.jsonl"
    asked = '{"question": "1 + 1?", "choices": ["one", "two"], "answer": %s'
    good = asked % '"two"}'
    file.write_text(f"{good}\n\n{asked % '0}'}\n")
    assert [each["answer"] for each in questions(file)] == [1, 0]
    for wrong in ("2}", "-1}", "true}", '"three"}', "null}", '"two"'):
        file.write_text(f"{good}\n{asked % wrong}\n")
        with pytest.raises(SystemExit, match="line 2: question, choices and answer are wanted"):
            questions(file)
    file.write_text("\n")
    with pytest.raises(SystemExit, match="no question in it"):
        questions(file)


def _pruned(calibration: str, wikitext: float, seed: int = 0) -> dict[str, object]:
    """A row of 20 % by the default; 1.5 times dense on every far text."""
    from _pruning_picture import TEXTS

    case = {"method": "wanda", "calibration": calibration, "shape": "ffn", "ratio": 0.2, "seed": seed}
    setting = {"model": "m", "samples": 128, "length": 512, "windows": 64}
    return {"key": case | setting, "found": {"ratio": dict.fromkeys(TEXTS, 1.5) | {"wikitext": wikitext}}}


def test_what_is_met_is_not_called_missed_and_the_mean_of_the_seeds_counts() -> None:
    from _pruning_sections import pruning

    rows = [_pruned("wikitext", 1.46), _pruned("wikitext", 1.5, seed=1), _pruned("self+wikitext", 1.57)]
    lines = pruning(rows).splitlines()
    (valid,) = [line for line in lines if "| 1.47; aim 1.4 not reached |" in line]
    assert valid.endswith("| 1.480 **missed** |  |  |  |  |")
    (half,) = [line for line in lines if "1.57; far 1.55" in line]
    assert half.endswith("| 1.570 | 1.500 | 1.500 | 1.500 | 1.500 |")


def test_the_picture_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    from _pruning_picture import draw

    draw([], tmp_path / "nothing.png")
    draw([_pruned("self", 1.9)], tmp_path / "some" / "one.png")
    assert (tmp_path / "some" / "one.png").read_bytes() != (tmp_path / "nothing.png").read_bytes()


def test_machines_are_named_once_with_all_their_commits() -> None:
    from _markdown import provenance

    host = {"cpu": "A", "cores": 2, "memory": 2**30}
    rows = [
        {"machine": host | {"load": load}, "versions": {"commit": commit, "torch": "2"}, "date": f"2026-11-{day}T"}
        for load, commit, day in ((0.1, "a", 23), (0.9, "b", 28), (0.5, "a", 25))
    ]
    rows.append({"machine": host | {"cpu": "B"}, "versions": {"torch": "2"}, "date": "2026-11-28T"})
    assert provenance(rows) == (
        "Measured 2026-11-23 to 2026-11-28 on A, 2 cores, 1 GiB; torch 2; commits a, b.\n\n"
        "Measured 2026-11-28 on B, 2 cores, 1 GiB; torch 2; commit unknown.\n"
    )
