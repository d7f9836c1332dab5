"""What each reducer decides, given the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mmefficient.errors import BudgetError, PlanError
from mmefficient.methods.reducers.divprune import DivPrune
from mmefficient.methods.reducers.exit import Exit
from mmefficient.methods.reducers.fastervlm import FasterVLM
from mmefficient.methods.reducers.fastv import FastV
from mmefficient.methods.reducers.grid import Grid, places
from mmefficient.methods.reducers.pool import Pool, overlaps
from mmefficient.methods.reducers.random import Random
from mmefficient.methods.reducers.scope import Scope
from mmefficient.methods.reducers.visionzip import VisionZip
from mmefficient.methods.reducers.vispruner import VisPruner
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


def test_fastervlm_keeps_what_the_class_token_attends_to() -> None:
    here = tokens((4, 4), (2, 3))
    assert here.tower is not None
    _, kept = decide(FasterVLM(keep=0.5), here)
    assert kept[0] == sorted(here.tower.attention[0].topk(8).indices.tolist())
    assert kept[1] == sorted(here.tower.attention[1, :6].topk(3).indices.tolist())


def slow_divprune(features: torch.Tensor, count: int) -> list[int]:
    """The released rule, one token at a time."""
    apart = [[1 - float(F.cosine_similarity(x, y, dim=0)) for y in features] for x in features]
    places_ = range(len(features))
    isolation = [min(apart[i][j] for j in places_ if j != i) for i in places_] if len(features) > 1 else [0.0]
    picked = [isolation.index(max(isolation))]
    while len(picked) < count:
        left = [i for i in places_ if i not in picked]
        picked.append(max(left, key=lambda i: (min(apart[i][j] for j in picked), -i)))
    return sorted(picked)


@pytest.mark.parametrize("keep", [1, 3, 0.5, 1.0])
def test_divprune_equals_the_slow_rule(keep: float | int) -> None:
    here = tokens((4, 5), (2, 3), (1, 3))
    _, kept = decide(DivPrune(keep=keep), here)
    for unit in here.units:
        expected = slow_divprune(here.hidden[unit.row, : unit.count], resolve_budget(keep, unit))
        assert kept[unit.row] == expected


def test_divprune_never_takes_a_copy_before_all_others() -> None:
    here = tokens((2, 4))
    hidden = here.hidden.clone()
    hidden[0, 1] = hidden[0, 6]
    _, [kept] = decide(DivPrune(keep=7), replace(here, hidden=hidden))
    assert kept == [0, 1, 2, 3, 4, 5, 7]


def slow_vispruner(features: torch.Tensor, attention: torch.Tensor, count: int, share: float) -> list[int]:
    """The released rule on lists."""
    ranked = sorted(range(len(attention)), key=lambda place: (-float(attention[place]), place))
    important, rest = ranked[: int(count * share)], ranked[int(count * share) :]
    if len(important) == count:
        return sorted(important)
    while len(rest) > count - len(important):
        even, odd = rest[::2], rest[1::2]
        likeness = {i: max(float(F.cosine_similarity(features[i], features[j], dim=0)) for j in odd) for i in even}
        alike = sorted(even, key=lambda i: -likeness[i])
        rest = alike[min(8, len(rest) - count + len(important), len(even)) :] + odd
    return sorted(important + rest)


@pytest.mark.parametrize(("keep", "share"), [(6, 0.5), (0.3, 0.75), (5, 0.0), (1.0, 0.5), (4, 1.0), (1, 0.0)])
def test_vispruner_equals_the_slow_rule(keep: float | int, share: float) -> None:
    here = tokens((7, 7), (3, 4))
    assert here.tower is not None
    _, kept = decide(VisPruner(keep=keep, important=share), here)
    for unit in here.units:
        facts = (x[unit.row, : unit.count] for x in (here.tower.features, here.tower.attention))
        assert kept[unit.row] == slow_vispruner(*facts, resolve_budget(keep, unit), share)


def test_vispruner_limits() -> None:
    with pytest.raises(PlanError, match="important"):
        VisPruner(important=1.5)


def slow_scope(features: torch.Tensor, attention: torch.Tensor, count: int, alpha: float) -> list[int]:
    """The released rule, one patch at a time."""
    places_ = range(len(features))
    alike = [[float(F.cosine_similarity(x, y, dim=0)) for y in features] for x in features]
    covered = [0.0 for _ in places_]
    picked: list[int] = []
    while len(picked) < count:
        gain = {
            j: sum(max(0.0, alike[i][j] - covered[i]) for i in places_) * float(attention[j]) ** alpha
            for j in places_
            if j not in picked
        }
        picked.append(max(gain, key=lambda j: gain[j]))
        covered = [max(covered[i], alike[i][picked[-1]]) for i in places_]
    return sorted(picked)


@pytest.mark.parametrize(("keep", "alpha"), [(1, 1.0), (0.4, 1.0), (3, 0.0), (0.5, 2.0), (1.0, 1.0)])
def test_scope_equals_the_slow_rule(keep: float | int, alpha: float) -> None:
    here = tokens((4, 5), (2, 3), (1, 3)) if keep == 3 else tokens((4, 5), (2, 3))
    assert here.tower is not None
    _, kept = decide(Scope(keep=keep, alpha=alpha), here)
    for unit in here.units:
        facts = (x[unit.row, : unit.count] for x in (here.tower.features, here.tower.attention))
        assert kept[unit.row] == slow_scope(*facts, resolve_budget(keep, unit), alpha)


def test_scope_refuses_a_negative_power() -> None:
    with pytest.raises(PlanError, match="alpha"):
        Scope(alpha=-1.0)
