"""Several sources by share: how many windows each gives, that they are each source's own, and every refusal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.cli import main
from compress.data import BUILTIN, DataSpec, check, counts, parse_sources, windows
from compress.errors import UserError
from compress.recipe import dump, loads
from tests import sparse, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("data") / "pico")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """Two files whose letters differ: lower and upper case."""
    for name, text in (("a.txt", "abcdefghijklm nopq"), ("b.txt", "ABCDEFGHIJKLM NOPQ")):
        (tmp_path / name).write_text("".join(text[i % 18] + text[i * i % 17] for i in range(2000)))
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


def rows(ids: Any) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


def test_every_window_is_given_and_no_count_is_off_by_one() -> None:
    dice = random.Random(0)
    for _ in range(500):
        shares = {f"{i}.txt": dice.choice([dice.random() + 1e-3, 1.0, 3.0]) for i in range(dice.randint(2, 6))}
        samples = dice.randint(1, 200)
        try:
            found = counts(DataSpec(source=shares, samples=samples))
        except UserError as error:
            small = min(shares.values()) / sum(shares.values()) * samples
            assert small < 1 and "windows is none" in error.message
            continue
        exact = {name: share / sum(shares.values()) * samples for name, share in shares.items()}
        given = {name: count for name, count in found.items() if count is not None}
        assert sum(given.values()) == samples and given.keys() == shares.keys()
        assert all(abs(given[name] - exact[name]) < 1 for name in shares)
        above = {name: exact[name] % 1 for name in shares if given[name] > exact[name]}
        below = {name: exact[name] % 1 for name in shares if given[name] < exact[name]}
        if above and below:
            assert min(above.values()) >= max(below.values()) - 1e-9, "a larger remainder went without"


def test_shares_are_normalised_and_their_order_is_nothing(texts: tuple[str, str]) -> None:
    one, two = texts
    for source in ({one: 0.3, two: 0.1}, {one: 3, two: 1}, {two: 1e-3, one: 3e-3}):
        assert counts(DataSpec(source=source, samples=8)) == {one: 6, two: 2}
    assert counts(DataSpec(source={two: 1, one: 1}, samples=3)) == {one: 2, two: 1}, "equal: the first name"


@pytest.mark.parametrize("part", ["calibration", "training"])
def test_a_mix_is_the_windows_of_its_sources_in_seeded_order(part: Any, folder: Path, texts: tuple[str, str]) -> None:
    one, two = texts
    spec = DataSpec(source={one: 3, two: 1}, samples=40, length=16)
    found = windows(spec, part, folder, 5)
    parts = [windows(DataSpec(source=s, samples=n, length=16), part, folder, 5) for s, n in ((one, 30), (two, 10))]
    together = [row for tokens in parts for row in rows(tokens.ids)]
    assert sorted(rows(found.ids)) == sorted(together) and rows(found.ids) != together
    assert found.tokens == sum(tokens.tokens for tokens in parts)
    assert found.note == "; ".join(tokens.note for tokens in parts)
    np.testing.assert_array_equal(windows(spec, part, folder, 5).ids, found.ids)
    swapped = windows(spec.model_copy(update={"source": {two: 0.25, one: 0.75}}), part, folder, 5)
    np.testing.assert_array_equal(swapped.ids, found.ids)
    assert swapped.digest == found.digest != parts[0].digest
    assert not np.array_equal(windows(spec, part, folder, 6).ids, found.ids)


def test_evaluation_reads_one_source_after_the_other_whatever_the_seed(folder: Path, texts: tuple[str, str]) -> None:
    one, two = texts
    spec = DataSpec(source={two: 1, one: 1}, samples=10, length=16)
    parts = [windows(DataSpec(source=s, samples=5, length=16), "evaluation", folder, 0).ids for s in (one, two)]
    for seed in (0, 1):
        np.testing.assert_array_equal(windows(spec, "evaluation", folder, seed).ids, np.concatenate(parts))


def test_one_source_with_a_share_is_that_source(folder: Path, texts: tuple[str, str]) -> None:
    one = texts[0]
    for samples in (None, 4):
        alone = windows(DataSpec(source=one, samples=samples, length=16), "training", folder, 0)
        shared = windows(DataSpec(source={one: 0.2}, samples=samples, length=16), "training", folder, 0)
        assert (shared.digest, shared.note) == (alone.digest, alone.note)
        np.testing.assert_array_equal(shared.ids, alone.ids)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (DataSpec(source={"a.txt": 1, "b.txt": 1}), "several sources need samples"),
        (
            DataSpec(source={"a.txt": 1, "b.txt": 0.001}, samples=64),
            "b.txt: its share of 0.000999 of 64 windows is none",
        ),
        (
            DataSpec(source={"a.txt": 1, "b.csv": 1, "gone.txt": 1}, samples=64),
            "data source 'b.csv': no such folder; expected builtin",
        ),
        (DataSpec(source={"a.txt": 1, BUILTIN: 1}, samples=64, length=512), "a.txt: at most 4001 tokens of training"),
    ],
)
def test_what_a_mix_cannot_give_is_refused(
    spec: DataSpec, said: str, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check(spec, "training")
    assert said in caught.value.message and "\n" not in caught.value.message
    if "gone.txt" in spec.source:
        assert "gone.txt: no such data file" in caught.value.message, "every source is told at once"


def test_a_share_that_is_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    with pytest.raises(
        UserError, match=r"^data source 'a.txt=x': the share of a.txt is 'x', allowed: a number above 0"
    ):
        check(DataSpec(source="a.txt=x"), "training")


RECIPE = "model: m\nsteps: [prune: {ffn: 0.5}]\ndata: {calibration: {source: %s, samples: 8}}\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{}", "found {}, allowed: a source (builtin, self, hub:"),
        ("[a.txt]", "found ['a.txt'], allowed: a source (builtin, self, hub:"),
        ("{a.txt: 0}", "the share of a.txt is 0, allowed: a number above 0"),
        ("{a.txt: 1, b.txt: -0.5}", "the share of b.txt is -0.5, allowed: a number above 0"),
        ("{a.txt: half}", "the share of a.txt is 'half', allowed: a number above 0"),
        ("{a.txt: true}", "the share of a.txt is True, allowed: a number above 0"),
        ('""', "found '', allowed: a source"),
    ],
)
def test_a_recipe_tells_what_a_source_takes(source: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        loads(RECIPE % source)
    assert caught.value.message.startswith("recipe:3: data.calibration.source: ") and said in caught.value.message


def test_a_mix_survives_the_recipe_it_is_written_to() -> None:
    recipe = loads(RECIPE % "{hub:org/name@v1:train: 0.5, a.txt: 1, builtin: 0.5}")
    assert recipe.data.calibration.source == {"hub:org/name@v1:train": 0.5, "a.txt": 1.0, "builtin": 0.5}
    assert loads(dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("given", "source"),
    [
        (["a.txt"], "a.txt"),
        (["a.txt=0.5"], "a.txt"),
        (["x=y.txt"], "x=y.txt"),
        (["a.txt", "builtin"], {"a.txt": 1.0, "builtin": 1.0}),
        (["a.txt=0.5", "builtin=2"], {"a.txt": 0.5, "builtin": 2.0}),
        (["hub:o/n:train=1e-1", "x=y.txt=3"], {"hub:o/n:train": 0.1, "x=y.txt": 3.0}),
    ],
)
def test_data_flags_are_sources_by_share(given: list[str], source: Any) -> None:
    assert parse_sources(given) == source


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a.txt=1", "b.txt"], "--data: b.txt has no share, but others have"),
        (["a.txt", "a.txt"], "--data: a.txt is named twice"),
        (["a.txt=0", "b.txt=1"], "--data: the share of a.txt is 0, allowed: a number above 0"),
        (["a.txt=inf", "b.txt=1"], "--data: the share of a.txt is inf, allowed: a number above 0"),
        (["gone.txt=1", "builtin=3"], "--data: gone.txt: no such data file"),
        (["a\nb.txt"], r"--data: found 'a\nb.txt', which holds characters that cannot be shown"),
    ],
)
def test_wrong_data_flags_are_one_line_of_the_command(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = sparse.llama(tmp_path / "model")
    flags = [word for source in given for word in ("--data", source)]
    assert main(["prune", str(model), "-o", "out", "--ffn", "0.5", *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]


def test_prune_on_a_mix_writes_it_into_the_recipe_and_counts_it(
    folder: Path, texts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", f"{texts[0]}=1", "--data", "builtin=3", "--samples", "8", "--length", "32", "--threads", "1"]
    out = tmp_path / "out"
    assert main(["prune", str(folder), "-o", str(out), "--ffn", "0.5", *flags]) == 0
    said = capsys.readouterr().err
    assert f"calibration: 2 of 125 windows x 32 tokens, chosen with seed 0, from {texts[0]}" in said
    assert "calibration: 6 of " in said and "from builtin" in said
    recipe = loads((out / "recipe.yaml").read_text())
    assert recipe.data.calibration == DataSpec(source={texts[0]: 1.0, "builtin": 3.0}, samples=8, length=32)
