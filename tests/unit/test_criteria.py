"""Every criterion of the table: rankings are permutations with finite costs that follow their units; the formulas."""

from __future__ import annotations

import pytest
import torch

from compress.arch import FAMILIES, Group, family_of
from compress.checkpoint.headers import read_header
from compress.criteria import CRITERIA, GroupView, Ranking, ranking_by_score
from compress.steps.prune.surgery import view
from tests import tiny

DAMPING = 0.01
SHAPES = {"neurons": (40, 1), "heads": (6, 4)}  # units, columns of one


def problem(units: int, width: int, *, rows: int = 10, seed: int = 0) -> GroupView:
    """A random group: reader [rows, units*width], the Gram of correlated inputs, two owned slices a unit."""
    generator = torch.Generator().manual_seed(seed)
    columns = units * width

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = (
        random(300, columns) @ (torch.eye(columns) + 0.3 * random(columns, columns)) * (0.5 * random(columns)).exp()
    )
    reader = random(rows, columns)
    owned = (random(units, width * 7), reader.T.reshape(units, -1))
    return GroupView("layer 0 group", width, reader, inputs.T @ inputs / len(inputs), owned)


def rank(name: str, seen: GroupView) -> Ranking:
    return CRITERIA[name].load()(seen, DAMPING)


def shuffled(seen: GroupView, order: torch.Tensor) -> GroupView:
    """The same group with its units in another order: unit u of the result is unit order[u] of `seen`."""
    columns = (order[:, None] * seen.width + torch.arange(seen.width)).flatten()
    assert seen.hessian is not None
    return GroupView(
        seen.name,
        seen.width,
        seen.reader[:, columns].contiguous(),
        seen.hessian[columns][:, columns].contiguous(),
        tuple(part[order].contiguous() for part in seen.owned),
    )


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
@pytest.mark.parametrize("name", CRITERIA)
def test_permuting_the_units_permutes_the_ranking(name: str, shape: str) -> None:
    units, width = SHAPES[shape]
    seen = problem(units, width)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(1))
    first, second = rank(name, seen), rank(name, shuffled(seen, order))
    assert order[second.order].tolist() == first.order.tolist()
    torch.testing.assert_close(second.cost, first.cost[order], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_unit_that_does_nothing_goes_first(name: str) -> None:
    seen = problem(40, 1)
    assert seen.hessian is not None
    seen.reader[:, 17] = 0
    seen.hessian[17], seen.hessian[:, 17] = 0, 0  # its input is dead as well: nobody has use of it
    for part in seen.owned:
        part[17] = 0
    ranking = rank(name, seen)
    assert int(ranking.order[0]) == 17
    assert float(ranking.cost[17]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if not entry.needs_gram])
def test_what_needs_no_gram_takes_none(name: str) -> None:
    seen = problem(12, 2)
    without = GroupView(seen.name, seen.width, seen.reader, None, seen.owned)
    assert torch.equal(rank(name, without).cost, rank(name, seen).cost)


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if entry.needs_gram])
def test_what_needs_the_gram_uses_it(name: str) -> None:
    seen = problem(12, 2)
    assert seen.hessian is not None
    plain = GroupView(seen.name, seen.width, seen.reader, torch.eye(24), seen.owned)
    assert rank(name, plain).order.tolist() != rank(name, seen).order.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_wanda_is_its_formula(shape: str) -> None:
    units, width = SHAPES[shape]
    seen = problem(units, width, seed=2)
    assert seen.hessian is not None
    expected = []
    for unit in range(units):
        energy = 0.0
        for j in range(unit * width, (unit + 1) * width):
            for row in seen.reader:
                energy += float(row[j]) ** 2 * float(seen.hessian[j, j])
        expected.append(energy)
    ranking = rank("wanda", seen)
    torch.testing.assert_close(ranking.cost, torch.tensor(expected), rtol=1e-4, atol=0)
    assert ranking.order.tolist() == sorted(range(units), key=lambda unit: expected[unit])


def test_magnitude_is_the_norm_of_all_that_a_unit_owns() -> None:
    seen = problem(20, 3, seed=3)
    expected = [sum(float(v) ** 2 for part in seen.owned for v in part[unit]) ** 0.5 for unit in range(20)]
    torch.testing.assert_close(rank("magnitude", seen).cost, torch.tensor(expected), rtol=1e-4, atol=0)
    for index, part in enumerate(seen.owned):  # and no slice is left out
        louder = [other.clone() for other in seen.owned]
        louder[index][5] = part[5] * 100
        changed = GroupView(seen.name, seen.width, seen.reader, seen.hessian, tuple(louder))
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
    assert function.__module__ == f"compress.criteria.{name}" and function.__doc__
