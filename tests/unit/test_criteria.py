"""Every criterion of the table: rankings are permutations with finite costs that follow their units; the formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.arch import FAMILIES, Group, family_of
from compress.checkpoint.headers import read_header
from compress.criteria import CRITERIA, GroupView, Ranking, ranking_by_score
from compress.steps.prune.surgery import view
from compress.stream import GRADIENTS, WHOLE, Statistic
from compress.stream.statistics import KINDS
from tests import tiny
from tests.brute import statistics

DAMPING = 0.01
SHAPES = {"neurons": (40, 1), "heads": (6, 4)}  # units, columns of one
SCORES: tuple[Statistic, ...] = ("taylor", "fisher", "tp_magnitude", "tp_taylor")  # made of the dense model, by unit
LOOKING = [name for name in CRITERIA if name != "random"]  # what looks at the units at all


def inputs(units: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random inputs [5 windows, 60 tokens, units*width]: correlated, far from zero in some columns, and of another
    strength in every window."""
    generator = torch.Generator().manual_seed(seed)
    columns = units * width

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mixed = random(5, 60, columns) @ (torch.eye(columns) + 0.3 * random(columns, columns))
    return (mixed + 2 * random(columns)) * (0.5 * random(columns)).exp() * random(5, 1, columns).exp()


def problem(units: int, width: int, *, rows: int = 10, seed: int = 0) -> GroupView:
    """A random group: reader [rows, units*width], all statistics of `inputs`, random ones of gradients, two owned
    slices a unit."""
    generator = torch.Generator().manual_seed(seed + 100)
    found = statistics(inputs(units, width, seed), width)
    for kind in SCORES:
        found[kind] = torch.randn(units, generator=generator).exp()
    reader = torch.randn(rows, units * width, generator=generator)
    owned = (torch.randn(units, width * 7, generator=generator), reader.T.reshape(units, -1))
    return GroupView("layer 0 group", width, reader, owned, found, (seed, 0, 7))


def rank(name: str, seen: GroupView) -> Ranking:
    return CRITERIA[name].load()(seen, DAMPING)


def shuffled(seen: GroupView, order: torch.Tensor) -> GroupView:
    """The same group with its units in another order: unit u of the result is unit order[u] of `seen`."""
    columns = (order[:, None] * seen.width + torch.arange(seen.width)).flatten()
    found = seen.statistics
    moved: dict[Statistic, torch.Tensor] = {
        "gram": found["gram"][columns][:, columns],
        "square": found["square"][columns],
        "variance": found["variance"][columns],
        **{kind: found[kind][order] for kind in ("activity", *SCORES)},
    }
    owned = tuple(part[order].contiguous() for part in seen.owned)
    return replace(seen, reader=seen.reader[:, columns].contiguous(), owned=owned, statistics=moved)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CRITERIA)
def test_a_ranking_is_a_permutation_with_finite_costs(name: str, shape: str) -> None:
    units, width = SHAPES[shape]
    ranking = rank(name, problem(units, width))
    assert ranking.order.shape == ranking.cost.shape == (units,)
    assert sorted(ranking.order.tolist()) == list(range(units))
    assert bool(torch.isfinite(ranking.cost).all()) and bool((ranking.cost > 0).all())
    assert len(set(ranking.cost.tolist())) == units


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOOKING)
def test_permuting_the_units_permutes_the_ranking(name: str, shape: str) -> None:
    units, width = SHAPES[shape]
    seen = problem(units, width)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(1))
    first, second = rank(name, seen), rank(name, shuffled(seen, order))
    assert order[second.order].tolist() == first.order.tolist()
    torch.testing.assert_close(second.cost, first.cost[order], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", LOOKING)
def test_a_unit_that_does_nothing_goes_first(name: str) -> None:
    seen = problem(40, 1)
    seen.reader[:, 17] = 0
    for found in seen.statistics.values():  # its input is dead as well: nobody has use of it
        found[17], found[..., 17] = 0, 0
    for part in seen.owned:
        part[17] = 0
    ranking = rank(name, seen)
    assert int(ranking.order[0]) == 17
    assert float(ranking.cost[17]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", CRITERIA)
def test_what_a_criterion_needs_is_all_that_it_takes(name: str) -> None:
    needs, seen = CRITERIA[name].needs, problem(12, 2)
    alone = replace(seen, statistics={kind: value for kind, value in seen.statistics.items() if kind in needs})
    assert torch.equal(rank(name, alone).cost, rank(name, seen).cost)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in CRITERIA for kind in sorted(CRITERIA[name].needs)])
def test_what_a_criterion_needs_it_uses(name: str, kind: Statistic) -> None:
    assert kind in KINDS or kind in GRADIENTS | WHOLE
    seen = problem(12, 2)
    plain = torch.eye(24) if kind == "gram" else torch.ones_like(seen.statistics[kind])
    other = replace(seen, statistics={**seen.statistics, kind: plain})
    assert rank(name, other).order.tolist() != rank(name, seen).order.tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "center"), [("wanda", False), ("flap", True)])
def test_the_energy_of_a_unit_by_its_formula(name: str, center: bool, shape: str) -> None:
    """wanda: E ||W_u x_u||^2 of columns that do not work together; flap: the same of x less its mean."""
    units, width = SHAPES[shape]
    seen = problem(units, width, seed=2)
    reader, x = seen.reader.double().numpy(), inputs(units, width, 2).double().numpy().reshape(-1, units * width)
    expected = []
    for unit in range(units):
        energy = 0.0
        for j in range(unit * width, (unit + 1) * width):
            column = x[:, j] - (sum(x[:, j]) / len(x) if center else 0)
            energy += sum(np.linalg.norm(reader[:, j] * value) ** 2 for value in column) / len(x)
        expected.append(energy)
    ranking = rank(name, seen)
    np.testing.assert_allclose(ranking.cost, expected, rtol=1e-4)
    assert ranking.order.tolist() == sorted(range(units), key=lambda unit: expected[unit])


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_is_its_formula(shape: str) -> None:
    units, width = SHAPES[shape]
    x = inputs(units, width, 4).double().numpy()
    expected = []
    for unit in range(units):
        means = []
        for window in x[..., unit * width : (unit + 1) * width]:
            means.append(sum(sum(value**2 for value in token) ** 0.5 for token in window) / len(window))
        expected.append((sum(mean**2 for mean in means) / len(means)) ** 0.5)
    ranking = rank("activation", problem(units, width, seed=4))
    np.testing.assert_allclose(ranking.cost, expected, rtol=1e-4)
    assert ranking.order.tolist() == sorted(range(units), key=lambda unit: expected[unit])


@pytest.mark.parametrize("kind", SCORES)
def test_a_score_of_the_whole_model_is_taken_as_it_is(kind: Statistic) -> None:
    seen = problem(40, 1, seed=6)
    ranking = rank(kind.replace("_", "-"), seen)
    assert torch.equal(ranking.cost, seen.statistics[kind])
    assert ranking.order.tolist() == sorted(range(40), key=lambda unit: float(seen.statistics[kind][unit]))


def test_random_draws_from_its_seed_alone() -> None:
    seen = problem(40, 1)
    drawn = rank("random", seen).order.tolist()
    assert rank("random", replace(problem(40, 1, seed=5), seed=seen.seed)).order.tolist() == drawn
    for seed in [(1, *seen.seed[1:]), (*seen.seed[:-1], 8)]:
        assert rank("random", replace(seen, seed=seed)).order.tolist() != drawn
    first = [int(rank("random", replace(seen, seed=(seed,))).order[0]) for seed in range(800)]
    assert set(first) == set(range(40))  # any may be the first to go


def test_magnitude_is_the_norm_of_all_that_a_unit_owns() -> None:
    seen = problem(20, 3, seed=3)
    expected = [sum(float(v) ** 2 for part in seen.owned for v in part[unit]) ** 0.5 for unit in range(20)]
    torch.testing.assert_close(rank("magnitude", seen).cost, torch.tensor(expected), rtol=1e-4, atol=0)
    for index, part in enumerate(seen.owned):  # and no slice is left out
        louder = [other.clone() for other in seen.owned]
        louder[index][5] = part[5] * 100
        changed = replace(seen, owned=tuple(louder))
        assert int(rank("magnitude", changed).order[-1]) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_shows_every_weight_that_goes_with_a_unit(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The owned slices of a unit are the numbers that a cut of it removes: found by poisoning them."""
    header = read_header(getattr(tiny, family)(tmp_path_factory.mktemp("models") / family))
    described = family_of(header)
    sizes = described.sizes(header)
    shapes = described.layer(sizes, header.text_config)
    for group in described.groups(sizes, header.text_config):
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        unit = group.units - 2
        for cut in group.cuts:
            owned = tensors[cut.tensor].narrow(cut.axis, cut.offset + unit * cut.width, cut.width)
            owned += 1
        seen = view(tensors, group, None, "layer 0")
        assert seen.reader.shape == (sizes.hidden, group.units * group.width)
        assert sum(float(part[unit].sum()) for part in seen.owned) == sum(float(t.sum()) for t in tensors.values())
        assert _weights(group, shapes) == group.parameters_per_unit(shapes)
        assert sum(part.shape[1] for part in seen.owned) >= group.parameters_per_unit(shapes)
        assert rank("magnitude", seen).order[-1] == unit


def _weights(group: Group, shapes: dict[str, tuple[int, ...]]) -> int:
    """Matrix entries of one unit, counted with masks."""
    count = 0
    for cut in group.cuts:
        if len(shapes[cut.tensor]) == 2:
            mask = torch.zeros(shapes[cut.tensor])
            mask.narrow(cut.axis, cut.offset, cut.width).fill_(1)
            count += int(mask.sum())
    return count


def test_ties_go_by_index() -> None:
    assert ranking_by_score(torch.tensor([2.0, 1.0, 2.0, 1.0])).order.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("name", CRITERIA)
def test_the_table_names_a_paper_and_a_file_of_one_function(name: str) -> None:
    entry = CRITERIA[name]
    assert entry.name == name
    assert any(character.isdigit() for character in entry.paper)  # a year
    function = entry.load()
    assert function.__module__ == f"compress.criteria.{entry.module}" and function.__doc__
