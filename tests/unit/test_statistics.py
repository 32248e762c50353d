"""Streamed statistics are those of all tokens at once, however they come in batches; only what is wanted is kept."""

from __future__ import annotations

import pytest
import torch

from compress.stream import Statistic
from compress.stream.statistics import KINDS, Cross, Gathered, gathering
from tests.brute import statistics

UNITS, WIDTH = 5, 3


def inputs(windows: int = 7, length: int = 11) -> torch.Tensor:
    """[windows, length, n]; windows of different strength, columns far from zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(windows, length, UNITS * WIDTH, generator=generator)
    strength = torch.randn(windows, 1, UNITS * WIDTH, generator=generator).exp()
    return drawn * strength + torch.randn(UNITS * WIDTH, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_they_are_those_of_all_tokens(batch: int, dtype: torch.dtype) -> None:
    given = inputs().to(dtype)
    gathered = Gathered(set(KINDS), UNITS, WIDTH)
    for part in given.split(batch):
        gathered.add(part)
    found, expected = gathered.results(), statistics(given, WIDTH)
    assert found.keys() == expected.keys() == KINDS.keys()
    for kind, value in expected.items():
        torch.testing.assert_close(found[kind], value, rtol=1e-5, atol=1e-6, msg=lambda said, kind=kind: kind + said)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_is_gathered(kind: Statistic, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*arguments: object) -> None:
        raise AssertionError

    given = inputs()
    for other in KINDS.keys() - {kind}:
        monkeypatch.setitem(KINDS, other, unwanted)
    gathered = Gathered({kind}, UNITS, WIDTH)
    gathered.add(given)
    (found,) = gathered.results().items()
    assert found[0] == kind and found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], statistics(given, WIDTH)[kind], rtol=1e-5, atol=1e-6)


def test_the_variance_of_what_is_far_from_zero_is_not_lost() -> None:
    """Mean 300, deviation 0.1: a difference of two float32 squares near 90,000 would be anything."""
    given = 300 + 0.1 * torch.randn(16, 64, UNITS * WIDTH, generator=torch.Generator().manual_seed(0))
    gathered = Gathered({"variance"}, UNITS, WIDTH)
    for part in given.split(4):
        gathered.add(part)
    expected = statistics(given, WIDTH)["variance"]
    torch.testing.assert_close(gathered.results()["variance"], expected, rtol=1e-3, atol=0)
    naive = given.flatten(0, 1).square().mean(0) - given.flatten(0, 1).mean(0).square()
    assert not torch.allclose(naive, expected, rtol=0.1)


def weights(windows: int = 7, length: int = 11) -> torch.Tensor:
    """[windows, length] from 0 to large: some tokens weigh nothing, one whole window among them."""
    drawn = torch.rand(windows, length, generator=torch.Generator().manual_seed(1)) * 50
    drawn[drawn < 15] = 0
    drawn[2] = 0
    return drawn


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_weighted_they_are_those_of_all_tokens(batch: int) -> None:
    given, weighing = inputs(), weights()
    gathered = Gathered(set(KINDS), UNITS, WIDTH)
    for part, own in zip(given.split(batch), weighing.split(batch), strict=True):
        gathered.add(part, own)
    expected = statistics(given, WIDTH, weighing)
    for kind, value in gathered.results().items():
        torch.testing.assert_close(value, expected[kind], rtol=1e-5, atol=1e-6, msg=lambda said, kind=kind: kind + said)
        assert not torch.allclose(value, statistics(given, WIDTH)[kind], rtol=1e-2)


def test_tokens_of_weight_zero_are_as_good_as_absent() -> None:
    given, kept = inputs(), 8
    padded, cut = (Gathered(set(KINDS), UNITS, WIDTH) for _ in range(2))
    weighing = torch.ones(given.shape[:2])
    weighing[:, kept:] = 0
    padded.add(given, weighing)
    cut.add(given[:, :kept])
    found = padded.results()
    for kind, value in cut.results().items():
        torch.testing.assert_close(found[kind], value, rtol=1e-5, atol=1e-6)


def test_cross_statistics_are_weighted_as_well() -> None:
    given, wanted, weighing = inputs(), inputs()[..., :4].flip(1), weights()
    found = Cross(4, UNITS * WIDTH, "cpu")
    for part, want, own in zip(given.split(2), wanted.split(2), weighing.split(2), strict=True):
        found.add(part, want, own)
    gram, product, energy = found.result()
    x, y, w = given.flatten(0, 1).double(), wanted.flatten(0, 1).double(), weighing.flatten().double()[:, None]
    torch.testing.assert_close(gram, (x.T @ (w * x) / w.sum()).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product, (y.T @ (w * x) / w.sum()).float(), rtol=1e-5, atol=1e-6)
    assert energy == pytest.approx(float((w * y.square()).sum() / w.sum()), rel=1e-6)


def test_hooks_take_the_weights_of_the_windows_that_pass() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(UNITS * WIDTH, 2))
    given, weighing = inputs(), weights()
    gathered = Gathered({"gram"}, UNITS, WIDTH)
    with gathering(layer, {"0": gathered}, weighing):
        for part in given.split(3):
            layer(part)
    expected = statistics(given, WIDTH, weighing)["gram"]
    torch.testing.assert_close(gathered.results()["gram"], expected, rtol=1e-5, atol=1e-6)
