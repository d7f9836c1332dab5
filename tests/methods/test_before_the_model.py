"""What methods before the language model decide, against one-token-at-a-time computations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmefficient.errors import BudgetError, PlanError
from mmefficient.matchers import OWN
from mmefficient.merging import match, schedule
from mmefficient.methods.reducers.cdpruner import CDPruner
from mmefficient.methods.reducers.dart import Dart
from mmefficient.methods.reducers.hiprune import HiPrune
from mmefficient.methods.reducers.prumerge import LAST, PruMerge
from mmefficient.methods.reducers.tome import ToMe, _After
from mmefficient.methods.reducers.trim import Trim
from mmefficient.plan import Plan
from mmefficient.points import (
    LayerTokens,
    MatchTokens,
    QuestionTokens,
    Reducer,
    Selection,
    VisualTokens,
    resolve_budget,
)
from tests import tiny
from tests.methods.test_reducers import decide, tokens

Found = dict[int, torch.Tensor]
"""Place of every token that stays, and what it is mixed from."""


def chosen(method: Reducer, given: VisualTokens) -> tuple[Selection, list[list[int]]]:
    """The selection of an adaptive method, and the kept places of every unit."""
    selection, counts = method.choose(given)
    assert selection.valid.sum(1).tolist() == counts
    kept = [row[:count].tolist() for row, count in zip(selection.index, counts, strict=True)]
    assert all(places == sorted(set(places)) for places in kept)
    return selection, kept


def compare(selection: Selection, kept: Sequence[list[int]], given: VisualTokens, expected: Sequence[Found]) -> None:
    assert selection.mix is not None
    for row, (unit, found) in enumerate(zip(given.units, expected, strict=True)):
        assert kept[row] == sorted(found)
        wanted = torch.stack([found[place] for place in sorted(found)])
        torch.testing.assert_close(selection.mix[row, : len(found), : unit.count], wanted)


def with_layers(given: VisualTokens, method: Reducer, ties: bool = False) -> VisualTokens:
    """Random facts of the tower layers that `method` reads; `ties`: few different values."""
    assert given.tower is not None
    shape = given.valid.shape
    layers = {}
    for layer in method.tower_layers:
        attention = torch.rand(shape) ** 4 / 4
        layers[layer] = LayerTokens((attention * 16).round() / 16 if ties else attention, torch.randn(*shape, 7))
    return replace(given, tower=replace(given.tower, layers=layers))


def best_first(scores: torch.Tensor) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: (-float(scores[place]), place))


def standing_out(scores: torch.Tensor) -> int:
    low, high = np.percentile(scores.numpy(), [25, 75])
    return int(sum(float(score) > high + 1.5 * (high - low) for score in scores))


def slow_prumerge(facts: LayerTokens, keep: float | int | None, plus: bool) -> Found:
    """The released rule, one patch at a time; a given budget is split as the method's page says."""
    count = len(facts.attention)
    ranked = best_first(facts.attention)
    if keep is None:
        out = standing_out(facts.attention)
        held = set(ranked[: max(1, out)])
        if plus:
            held |= set(range(0, count - 1, max(1, int(int(1 / (out / count)) / 3) if out else count // 3)))
    else:
        budget = keep if isinstance(keep, int) else max(1, int(keep * count + 0.5))
        wanted = budget if budget == count else max(1, budget - 1)
        held = set(ranked[: max(1, wanted // 4) if plus else wanted])
        free = [place for place in range(count) if place not in held]
        more = wanted - len(held)
        held |= {free[math.ceil((i + 1) * len(free) / more) - 1] for i in range(more)}
    found: Found = {}
    for place in held:
        mix = torch.zeros(count)
        mix[place] = 1
        others = [i for i in range(count) if i != place]
        others.sort(key=lambda i: -float(F.cosine_similarity(facts.keys[place], facts.keys[i], dim=0)))
        for i in others[:32]:
            mix[i] += facts.attention[i]
        found[place] = mix
    rest = [place for place in range(count) if place not in held]
    if rest and (keep is None or len(held) < budget):
        found[rest[-1]] = torch.tensor([float(facts.attention[i]) if i in rest else 0.0 for i in range(count)])
    return found


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("keep", [None, 6, 0.5, 1.0, 1])
def test_prumerge_equals_the_slow_rule(keep: float | int | None, plus: bool) -> None:
    method = PruMerge(keep=keep, plus=plus)
    for seed, ties in ((0, False), (1, True)):
        given = with_layers(tokens((8, 6), (3, 4), (2, 3), seed=seed), method, ties)
        assert given.tower is not None
        facts = given.tower.layers[LAST]
        selection, kept = chosen(method, given)
        each = [LayerTokens(facts.attention[u.row, : u.count], facts.keys[u.row, : u.count]) for u in given.units]
        compare(selection, kept, given, [slow_prumerge(one, keep, plus) for one in each])


def test_prumerge_refuses_more_than_there_is() -> None:
    method = PruMerge(keep=7)
    with pytest.raises(BudgetError, match="row 1 has 6 visual tokens"):
        method.choose(with_layers(tokens((3, 4), (2, 3)), method))


def slow_hiprune(middle: torch.Tensor, late: torch.Tensor, width: int, count: int, alpha: float) -> list[int]:
    anchors = best_first(middle)[: round(count * alpha / 5)]
    near = [place + move for place in anchors for move in (0, -1, 1, -width, width)]
    held = {min(max(place, 0), len(middle) - 1) for place in near}
    for place in best_first(late):
        if len(held) < count:
            held.add(place)
    return sorted(held)


@pytest.mark.parametrize(("keep", "alpha"), [(0.5, 0.1), (10, 0.9), (20, 0.5), (1, 0.1), (1.0, 1.0)])
def test_hiprune_equals_the_slow_rule(keep: float | int, alpha: float) -> None:
    method = HiPrune(keep=keep, alpha=alpha)
    for ties in (False, True):
        grids = [(6, 8), (5, 5), (4, 8)]
        given = with_layers(tokens(*grids), method, ties)
        assert given.tower is not None
        middle, late = (given.tower.layers[layer].attention for layer in method.tower_layers)
        _, kept = decide(method, given)
        for unit, (_, width) in zip(given.units, grids, strict=True):
            facts = (x[unit.row, : unit.count] for x in (middle, late))
            assert kept[unit.row] == slow_hiprune(*facts, width, resolve_budget(keep, unit), alpha)


def test_hiprune_reads_the_ninth_of_24_layers() -> None:
    assert HiPrune().tower_layers[0].layer == 0.375
    with pytest.raises(PlanError, match="alpha=2"):
        HiPrune(alpha=2)


SPACES = ("inverted", "plain", *sorted(OWN))


def with_match(given: VisualTokens, pieces: Sequence[int], space: str = "inverted") -> VisualTokens:
    """Random patches and questions of `pieces` pieces each."""
    valid = torch.arange(max(pieces)) < torch.tensor(pieces)[:, None]
    patches, texts = torch.randn(*given.valid.shape, 9) + 1, torch.randn(len(pieces), max(pieces), 9)
    if space in OWN:
        return replace(given, match=MatchTokens.embedded(space, patches.bfloat16(), texts, valid))
    return replace(given, match=MatchTokens(patches, texts, valid, space == "inverted"))


def over_pieces(found: MatchTokens, values: list[float]) -> float:
    value = max(values) if found.words else sum(values) / len(values)
    return -value if found.inverted else value


def slow_relevance(found: MatchTokens, row: int, count: int) -> list[float]:
    pieces = found.texts[row, found.valid[row]]
    patches = found.patches[row, :count]
    return [over_pieces(found, [float(F.cosine_similarity(p, t, dim=0)) for t in pieces]) for p in patches]


def slow_cdpruner(hidden: torch.Tensor, length: Sequence[float], count: int) -> list[int]:
    """Always the patch that makes the determinant of the picked block the largest."""
    places = range(len(hidden))
    features = F.normalize(hidden.double(), dim=-1)
    kernel = features @ features.T * torch.tensor(length).double()[:, None] * torch.tensor(length).double()
    picked: list[int] = []
    while len(picked) < count:
        volume = {j: float(torch.linalg.det(kernel[[*picked, j]][:, [*picked, j]])) for j in places if j not in picked}
        picked.append(max(volume, key=lambda j: volume[j]))
    return sorted(picked)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("keep", [1, 3, 0.3])
def test_cdpruner_equals_the_slow_rule(keep: float | int, space: str) -> None:
    given = with_match(tokens((4, 5), (2, 3), (3, 3)), (2, 1, 3), space)
    units = tuple(replace(unit, row=row) for unit, row in zip(given.units, (0, 0, 2), strict=True))
    given = replace(given, units=units)
    assert given.match is not None
    raw = [slow_relevance(given.match, place, unit.count) for place, unit in enumerate(units)]
    _, kept = decide(CDPruner(keep=keep), given)
    for place, unit in enumerate(units):
        together = [
            value for other, values in zip(units, raw, strict=True) if other.row == unit.row for value in values
        ]
        low, high = min(together), max(together)
        length = [(value - low + 1e-6) / (high - low) for value in raw[place]]
        count = resolve_budget(keep, unit)
        assert kept[place] == slow_cdpruner(given.hidden[place, : unit.count], length, count)


def test_cdpruner_takes_copies_last() -> None:
    given = with_match(tokens((2, 4)), (1,))
    assert given.match is not None
    hidden, patches = given.hidden.clone(), given.match.patches.clone()
    hidden[0, 6], patches[0, 6] = hidden[0, 1], patches[0, 1]
    _, [kept] = decide(CDPruner(keep=7), replace(given, hidden=hidden, match=replace(given.match, patches=patches)))
    assert kept == [0, 1, 2, 3, 4, 5, 7]


def slow_trim(found: MatchTokens, row: int, count: int, keep: float | int | None) -> Found:
    pieces = F.normalize(found.texts[row, found.valid[row]], dim=-1)
    products = [over_pieces(found, [float(p @ t) for t in pieces]) for p in found.patches[row, :count]]
    scores = torch.tensor(products).softmax(0)
    budget = max(1, standing_out(scores)) + 1 if keep is None else keep
    budget = budget if isinstance(budget, int) else max(1, int(budget * count + 0.5))
    held = best_first(scores)[: count if budget >= count else max(1, budget - 1)]
    mixes = {place: F.one_hot(torch.tensor(place), count).float() for place in held}
    rest = [place for place in range(count) if place not in held]
    if rest and budget > len(held):
        mixes[rest[-1]] = torch.tensor([1 / len(rest) if place in rest else 0.0 for place in range(count)])
    return mixes


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("keep", [None, 4, 0.5, 1.0, 1])
def test_trim_equals_the_slow_rule(keep: float | int | None, space: str) -> None:
    given = with_match(tokens((5, 6), (2, 3), (2, 2)), (1, 3, 2), space)
    assert given.match is not None
    selection, kept = chosen(Trim(keep=keep), given)
    compare(selection, kept, given, [slow_trim(given.match, u.row, u.count, keep) for u in given.units])


def slow_round(metric: list[torch.Tensor], leaving: int, lead: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    """One round of the released rule: the order of what is left, and pairs (from, into)."""
    even, odd = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
    pairs = []
    for i in even[1:] if lead else even:
        likeness = [float(F.cosine_similarity(metric[i], metric[j], dim=0)) for j in odd]
        pairs.append((max(likeness), i, odd[likeness.index(max(likeness))]))
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    merged = [(i, j) for _, i, j in pairs[:leaving]]
    gone = {i for i, _ in merged}
    return [i for i in even if i not in gone] + odd, merged


def slow_tome(keys: torch.Tensor, count: int) -> Found:
    """Merging until `count` are left, lists only."""
    held = len(keys)
    metric, share, home = list(keys), list(torch.eye(held)), list(range(held))
    while len(metric) > count:
        order, merged = slow_round(metric, min(len(metric) - count, len(metric) // 2))
        size = [float(row.count_nonzero()) for row in share]
        total = {j: (metric[j] * size[j], share[j] * size[j], size[j]) for j in order}
        for i, j in merged:
            total[j] = tuple(x + y * size[i] for x, y in zip(total[j], (metric[i], share[i], 1.0), strict=True))
        metric = [total[j][0] / total[j][2] for j in order]
        share = [total[j][1] / total[j][2] for j in order]
        home = [home[j] for j in order]
    return dict(zip(home, share, strict=True))


@pytest.mark.parametrize("keep", [1, 5, 0.4, 1.0])
def test_tome_after_the_tower_equals_the_slow_rule(keep: float | int) -> None:
    given = tokens((5, 5), (2, 3), (5, 5), (3, 4))
    assert given.tower is not None
    method = _After(keep, "keep")
    selection, kept = decide(method, given)
    facts = [given.tower.keys[unit.row, : unit.count] for unit in given.units]
    expected = [slow_tome(keys, resolve_budget(keep, unit)) for keys, unit in zip(facts, given.units, strict=True)]
    compare(selection, kept, given, expected)


@pytest.mark.parametrize("lead", [False, True])
def test_one_round_of_merging(lead: bool) -> None:
    """Ties included: equal likenesses go to the earlier token."""
    metric = torch.randint(-1, 2, (2, 11, 3)).float()
    size = torch.randint(1, 4, (2, 11)).float()
    merge = match(metric, 4, lead)
    for row in range(2):
        order, merged = slow_round(list(metric[row]), 4, lead)
        assert merge.keep(torch.arange(11).expand(2, -1))[row].tolist() == order
        total = {j: float(size[row, j]) for j in order}
        for i, j in merged:
            total[j] += float(size[row, i])
        assert merge.add(size)[row].tolist() == [total[j] for j in order]


def test_schedules() -> None:
    assert schedule(576, 64, 22)[:3] == [576, 553, 529]
    assert schedule(576, 64, 6)[-1] == 64
    assert schedule(16, 4, 2) == [16, 8, 4]
    assert schedule(16, 16, 0) == [16]
    for arguments in ((16, 3, 2), (16, 8, 0)):
        with pytest.raises(PlanError, match="keep more"):
            schedule(*arguments)
    with pytest.raises(PlanError, match="where="):
        ToMe(where="both")  # type: ignore[arg-type]


def slow_dart(
    states: torch.Tensor, norms: torch.Tensor, asked: torch.Tensor, asked_norms: torch.Tensor, count: int, pivots: int
) -> list[int]:
    held = best_first(norms)[: min(pivots, count)]
    asking = [states[place] for place in sorted(held)] + [asked[i] for i in sorted(best_first(asked_norms)[:pivots])]
    left = count - len(held)
    for turn, pivot in enumerate(asking):
        share = (turn + 1) * left // len(asking) - turn * left // len(asking)
        free = [place for place in range(len(states)) if place not in held]
        held += sorted(free, key=lambda place: float(F.cosine_similarity(pivot, states[place], dim=0)))[:share]
    return sorted(held)


@pytest.mark.parametrize("keep", [1, 5, 0.5, 1.0])
def test_dart_equals_the_slow_rule(keep: float | int) -> None:
    given = tokens((5, 6), (2, 3), (4, 4))
    valid = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    asked = QuestionTokens(torch.randn(3, 6, 8), valid, torch.randint(1, 5, (3, 6)) / 4)
    norms = torch.randint(1, 9, given.valid.shape) / 8  # ties
    _, kept = decide(Dart(keep=keep, image_pivots=3, text_pivots=3), replace(given, question=asked, key_norm=norms))
    assert asked.key_norm is not None
    for unit in given.units:
        mine = (given.hidden[unit.row, : unit.count], norms[unit.row, : unit.count])
        theirs = (asked.hidden[unit.row, valid[unit.row]], asked.key_norm[unit.row, valid[unit.row]])
        assert kept[unit.row] == slow_dart(*mine, *theirs, resolve_budget(keep, unit), 3)


def test_dart_needs_a_layer_before() -> None:
    with pytest.raises(PlanError, match="layer=0"):
        Dart(layer=0)
    with pytest.raises(PlanError, match="pivot"):
        Dart(image_pivots=0)


def test_dart_reads_the_layer_before() -> None:
    """Keys as layer 0 rotates them, and states as the last norm sees them, from the stock model's own modules."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 6)])
    seen: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    layers = model.get_decoder().layers
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
        for layer in layers[:2]
    ]
    with torch.no_grad():
        model(**batch)
        for handle in handles:
            handle.remove()
        (entering, kwargs), (states, _) = seen
        keys = layers[0].self_attn.k_proj(layers[0].input_layernorm(entering)).unflatten(-1, (2, -1)).transpose(1, 2)
        keys = apply_rotary_pos_emb(keys, keys, *kwargs["position_embeddings"])[1]
        norms, states = keys[0].abs().sum((0, 2)), model.get_decoder().norm(states)[0]
    visual = (batch["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    after = slice(int(visual[-1]) + 1, None)
    with Plan("dart(layer=1,keep=9,image_pivots=2,text_pivots=3)").apply(model) as run, torch.no_grad():
        model(**batch)
    # two visual pivots, three of text
    held = best_first(norms[visual])[:2]
    asking = [states[visual][place] for place in sorted(held)]
    asking += [states[after][i] for i in sorted(best_first(norms[after])[:3])]
    for turn, pivot in enumerate(asking):
        share = (turn + 1) * 7 // 5 - turn * 7 // 5
        free = [place for place in range(16) if place not in held]
        held += sorted(free, key=lambda place: float(F.cosine_similarity(pivot, states[visual][place], dim=0)))[:share]
    assert run.report().kept(0, 1).tolist() == sorted(held)
    assert run.report().kept(0, 0).tolist() == list(range(16))
