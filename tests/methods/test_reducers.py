"""What each reducer decides, given the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mmefficient.errors import BudgetError
from mmefficient.methods.reducers.exit import Exit
from mmefficient.methods.reducers.fastv import FastV
from mmefficient.methods.reducers.grid import Grid, places
from mmefficient.methods.reducers.pool import Pool, overlaps
from mmefficient.methods.reducers.random import Random
from mmefficient.methods.reducers.visionzip import VisionZip
from mmefficient.points import Reducer, Selection, TowerTokens, Unit, VisualTokens, resolve_budget, select_top


def tokens(*grids: tuple[int, int], seed: int = 0) -> VisualTokens:
    """One unit per grid, with random contents."""
    torch.manual_seed(seed)
    units = tuple(Unit(row, "image 0", 0, rows * cols, ((rows, cols),)) for row, (rows, cols) in enumerate(grids))
    width = max(unit.count for unit in units)
    valid = torch.arange(width) < torch.tensor([unit.count for unit in units])[:, None]
    tower = TowerTokens(
        torch.randn(len(units), width, 6), torch.rand(len(units), width), torch.randn(len(units), width, 5)
    )
    hidden, size = torch.randn(len(units), width, 8), torch.ones(len(units), width)
    return VisualTokens(units, hidden, valid, size, torch.rand(len(units), width), tower)


def decide(method: Reducer, given: VisualTokens) -> tuple[Selection, list[list[int]]]:
    """The selection, and the kept places of every unit."""
    counts = [method.budget(unit) for unit in given.units]
    selection = method.reduce(given, counts)
    assert selection.valid.sum(1).tolist() == counts
    kept = [row[:count].tolist() for row, count in zip(selection.index, counts, strict=True)]
    for places_, unit in zip(kept, given.units, strict=True):
        assert places_ == sorted(set(places_))
        assert all(0 <= place < unit.count for place in places_)
    return selection, kept


def test_ties_go_to_the_earlier_token() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 9.0, 9.0]])
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    selection = select_top(scores, valid, [4, 2])
    assert selection.index.tolist() == [[0, 1, 2, 4], [0, 1, 0, 0]]
    assert selection.valid.tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize(
    ("keep", "count", "expected"),
    [(0.25, 576, 144), (1.0, 7, 7), (1, 7, 1), (7, 7, 7), (0.001, 7, 1), (0.5, 7, 4), (0.5, 5, 3), (1 / 3, 576, 192)],
)
def test_budgets(keep: float | int, count: int, expected: int) -> None:
    assert resolve_budget(keep, Unit(0, "image 0", 0, count, ())) == expected


def test_budgets_beyond_the_unit_name_the_row() -> None:
    unit = Unit(3, "image 1", 1, 16, ((4, 4),))
    with pytest.raises(BudgetError, match="row 3 has 16 visual tokens in image 1 but 17"):
        FastV(keep=17).budget(unit)
    with pytest.raises(BudgetError, match=r"row 3 .* fewer than the 12 dominant and 5 contextual"):
        VisionZip(dominant=12, contextual=5).budget(unit)


def test_fastv_keeps_the_most_attended() -> None:
    here = tokens((4, 4), (2, 3))
    assert here.attention is not None
    _, kept = decide(FastV(keep=0.5), here)
    assert kept[0] == sorted(here.attention[0].topk(8).indices.tolist())
    assert kept[1] == sorted(here.attention[1, :6].topk(3).indices.tolist())


def test_random_depends_on_seed_and_place_in_the_row_alone() -> None:
    alone, beside = tokens((4, 4)), tokens((2, 2), (4, 4), (4, 4))
    _, [first] = decide(Random(keep=5), alone)
    _, [_, second, third] = decide(Random(keep=3), beside)
    assert decide(Random(keep=3), alone)[1] == [second] == [third]
    assert set(second) < set(first)
    assert decide(Random(keep=5, seed=1), alone)[1] != [first]
    decide(Random(keep=5, seed=-1), alone)


def test_exit_keeps_nothing() -> None:
    assert decide(Exit(layer=3), tokens((4, 4), (2, 3)))[1] == [[], []]


def test_grid_is_a_lattice_where_it_can_be() -> None:
    _, [kept] = decide(Grid(keep=0.25), tokens((8, 8)))
    assert kept == [row * 8 + col for row in range(1, 8, 2) for col in range(1, 8, 2)]
    assert decide(Grid(keep=1.0), tokens((3, 5)))[1] == [list(range(15))]


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3), st.data())
def test_grid_keeps_exactly_the_budget(grids: Sequence[tuple[int, int]], data: st.DataObject) -> None:
    areas = [rows * cols for rows, cols in grids]
    count = data.draw(st.integers(1, sum(areas)))
    found = places(grids, count)
    assert len(found) == len(set(found)) == count
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] < sum(areas)
    start = 0
    for area in areas:  # every grid gets its share by area
        inside = sum(start <= place < start + area for place in found)
        assert abs(inside - count * area / sum(areas)) <= 1
        start += area


@pytest.mark.parametrize("ratio", [2, 4])
def test_pool_equals_average_pooling(ratio: int) -> None:
    here = tokens((8, 8), (4, 8))
    selection, kept = decide(Pool(keep=1 / ratio**2), here)
    assert selection.mix is not None
    for unit, (rows, cols) in enumerate([(8, 8), (4, 8)]):
        image = here.hidden[unit, : rows * cols].T.unflatten(1, (rows, cols))
        expected = F.avg_pool2d(image, ratio).flatten(1).T
        torch.testing.assert_close((selection.mix[unit] @ here.hidden[unit])[: len(expected)], expected)
        assert len(kept[unit]) == len(expected)


@given(st.integers(1, 30), st.data())
def test_pool_weights_share_every_token_out(length: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(1, length))
    weights = overlaps(length, target)
    torch.testing.assert_close(weights.sum(1), torch.ones(target))
    torch.testing.assert_close(weights.sum(0), torch.full((length,), target / length))
    assert (weights >= 0).all()


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 1.0))
def test_pool_takes_the_nearest_grid(rows: int, cols: int, keep: float) -> None:
    unit = Unit(0, "image 0", 0, rows * cols, ((rows, cols),))
    [(down, along)] = Pool(keep=keep).targets(unit)
    scale = (resolve_budget(keep, unit) / unit.count) ** 0.5
    assert down == max(1, round(rows * scale))
    assert along == max(1, round(cols * scale))
    assert Pool(keep=keep).budget(unit) <= unit.count


def slow_visionzip(
    features: torch.Tensor, attention: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> dict[int, torch.Tensor]:
    """The released rule, one patch at a time: place of every token that stays, and its features."""
    chosen = sorted(range(len(attention)), key=lambda place: (-float(attention[place]), place))[:dominant]
    rest = [place for place in range(len(attention)) if place not in chosen]
    found = {place: features[place] for place in chosen}
    if not contextual:
        return found
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    others = [place for place in rest if place not in targets]
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for place in others:
        likeness = [float(F.cosine_similarity(keys[place], keys[target], dim=0)) for target in targets]
        assigned[targets[likeness.index(max(likeness))]].append(place)
    for target, places_ in assigned.items():
        found[target] = features[target] + (features[places_].mean(0) if places_ else 0)
    return found


@pytest.mark.parametrize(("dominant", "contextual"), [(3, 2), (1, 5), (5, 0), (0.25, 0.25), (4, 1)])
def test_visionzip_equals_the_slow_rule(dominant: float | int, contextual: float | int) -> None:
    here = tokens((5, 5), (3, 4))
    assert here.tower is not None
    method = VisionZip(dominant=dominant, contextual=contextual)
    selection, kept = decide(method, here)
    assert selection.mix is not None
    for unit in here.units:
        facts = (x[unit.row, : unit.count] for x in (here.tower.features, here.tower.attention, here.tower.keys))
        expected = slow_visionzip(*facts, *method.split(unit))
        assert kept[unit.row] == sorted(expected)
        mixed = (selection.mix[unit.row] @ here.tower.features[unit.row])[: len(expected)]
        torch.testing.assert_close(mixed, torch.stack([expected[place] for place in sorted(expected)]))
