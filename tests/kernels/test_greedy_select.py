from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mmefficient.kernels.greedy_select import greedy_select
from mmefficient.kernels.greedy_select.kernel import greedy_select as launch
from mmefficient.kernels.greedy_select.reference import first_scores

OBJECTIVES = ("max_min", "coverage", "volume")
SHAPES = [(21, 9), *(pytest.param(*shape, marks=pytest.mark.gpu) for shape in ((576, 64), (2880, 320)))]


def problem(items: int, objective: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs, validity and weights of three units, one of them full; what is not valid holds large numbers."""
    features = torch.nn.functional.normalize(torch.randn(3, items, max(64, items // 2), device=device), dim=-1)
    weight = torch.rand(3, items, device=device)
    valid = torch.arange(items, device=device) < torch.tensor([items, items - 5, 4], device=device)[:, None]
    pairs = features @ features.mT
    pairs = (pairs + pairs.mT) / 2  # a product of matrices need not be symmetric to the last bit
    if objective == "max_min":
        pairs = 1 - pairs
    elif objective == "volume":
        pairs = pairs * weight[:, None] * weight[:, :, None]
    both = valid[:, None] & valid[:, :, None]
    return pairs.masked_fill(~both, 1e4), valid, weight


def equal(found: torch.Tensor, wanted: torch.Tensor, valid: torch.Tensor) -> bool:
    counts = valid.sum(1).clamp(max=found.shape[1]).tolist()
    return all(torch.equal(a[:count], b[:count]) for a, b, count in zip(found, wanted, counts, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("items", "steps"), SHAPES)
def test_equals_the_reference(kernel: Any, device: torch.device, items: int, steps: int, objective: str) -> None:
    pairs, valid, weight = problem(items, objective, device)
    given: dict[str, Any] = {"objective": objective, "weight": weight if objective == "coverage" else None}
    found = kernel(greedy_select, pairs, valid, steps, **given)
    assert equal(found, greedy_select(pairs, valid, steps, **given, impl="reference"), valid)
    assert found.min() >= 0
    assert found.max() < items


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ties_go_to_the_earlier_item(kernel: Any, device: torch.device, objective: str) -> None:
    """Every sum of these numbers is exact, so equal means equal."""
    if objective == "volume":
        pairs = torch.diag_embed(torch.randint(1, 4, (2, 24), device=device) / 4)
    else:
        pairs = torch.randint(0, 4, (2, 24, 24), device=device) / 4
        pairs = torch.maximum(pairs, pairs.mT)
    valid = torch.ones(2, 24, dtype=torch.bool, device=device)
    found = kernel(greedy_select, pairs, valid, 24, objective=objective)
    wanted = [slow(unit.cpu(), 24, objective) for unit in pairs]
    assert found.tolist() == wanted
    assert greedy_select(pairs, valid, 24, objective=objective, impl="reference").tolist() == wanted


def slow(pairs: torch.Tensor, steps: int, objective: str) -> list[int]:
    """The definition, one candidate at a time."""
    items, picked = range(len(pairs)), list[int]()
    rule: dict[str, Callable[[int], float]] = {
        "max_min": lambda j: float(min(pairs[j, i] for i in (picked or items) if i != j)),
        "coverage": lambda j: sum(max(0.0, float(pairs[i, j]) - covered(pairs, i, picked)) for i in items),
        "volume": lambda j: float(torch.linalg.det(block(pairs, [*picked, j]))),
    }
    while len(picked) < steps:
        gain = {j: rule[objective](j) for j in items if j not in picked}
        picked.append(max(gain, key=lambda j: gain[j]))
    return picked


def covered(pairs: torch.Tensor, i: int, picked: Sequence[int]) -> float:
    return max([0.0, *(float(pairs[i, j]) for j in picked)])


def block(pairs: torch.Tensor, picked: Sequence[int]) -> torch.Tensor:
    return pairs.double()[list(picked)][:, list(picked)]


def test_volume_is_greedy_for_the_determinant() -> None:
    pairs, valid, _ = problem(18, "volume", torch.device("cpu"))
    picks = greedy_select(pairs, valid, 6, objective="volume")
    assert picks[0].tolist() == slow(pairs[0], 6, "volume")
    assert picks[2, :4].tolist() == slow(pairs[2, :4, :4], 4, "volume")


def test_volume_beyond_the_rank_goes_in_order(kernel: Any, device: torch.device) -> None:
    features = torch.eye(3, device=device).repeat(3, 1)[None]
    pairs, valid = features @ features.mT, torch.ones(1, 9, dtype=torch.bool, device=device)
    assert kernel(greedy_select, pairs, valid, 9, objective="volume").tolist() == [list(range(9))]
    assert greedy_select(pairs, valid, 9, objective="volume", impl="reference").tolist() == [list(range(9))]


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("parts", [1, 4, 9])
def test_any_number_of_programs(device: torch.device, objective: str, parts: int) -> None:
    pairs, valid, weight = problem(576, objective, device)
    first = first_scores(pairs, valid, objective, weight)
    wanted = greedy_select(pairs, valid, 64, objective=objective, weight=weight, impl="reference")  # type: ignore[arg-type]
    for _ in range(3):
        assert equal(launch(pairs, valid, first, 64, objective, PARTS=parts), wanted, valid)


def test_refuses_what_does_not_fit() -> None:
    pairs, valid = torch.zeros(1, 4, 4), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="'largest' is none of max_min, coverage, volume"):
        greedy_select(pairs, valid, 2, objective="largest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit"):
        greedy_select(pairs[:, :3], valid, 2, objective="coverage")


def test_traces_whole(device: torch.device) -> None:
    pairs, valid, _ = problem(21, "coverage", device)
    compiled = torch.compile(lambda p, v: greedy_select(p, v, 5, objective="coverage"), fullgraph=True, backend="eager")
    assert torch.equal(compiled(pairs, valid), greedy_select(pairs, valid, 5, objective="coverage"))


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_replays_from_a_graph(device: torch.device, objective: str) -> None:
    """Counters start anew in every replay."""
    pairs, valid, weight = problem(576, objective, device)
    first = first_scores(pairs, valid, objective, weight)
    wanted = launch(pairs, valid, first, 64, objective)  # also compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = launch(pairs, valid, first, 64, objective)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert equal(found, wanted, valid)
