"""Pyramid sparse attention against its definition: levels from ranks, and one softmax over keys of several sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmefficient.errors import PlanError
from mmefficient.methods.patterns.psa import PSA
from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import logits

BLOCK, N = 8, 44


def heads(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, N, 8, generator=noise, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def test_levels_are_shares_of_the_ranks() -> None:
    query, key, _ = heads(0)
    block = torch.arange(N) // BLOCK
    level = PSA((0.25, 0.25, 0.25, 0.0), BLOCK).level(query, key, block, 0.3)
    for head in range(2):
        weights = torch.zeros(N, N, dtype=torch.float64)
        for i in range(N):
            looked = [j for j in range(i + 1) if (i + j) % 16 == 0]
            found = [math.exp(0.3 * float(query[head, i] @ key[head, j])) for j in looked]
            for j, weight in zip(looked, found, strict=True):
                weights[i, j] = weight / sum(found)
        for row in range(6):
            rank = {b: float(weights[block == row][:, block == b].sum()) for b in range(1, row)}
            order = sorted(rank, key=lambda b: (-rank[b], b))
            for column in range(6):
                if column > row:
                    expected = 0
                elif column in (0, row):
                    expected = 1
                else:
                    at, total = order.index(column), len(order)
                    limits = [math.ceil(share * total) for share in (0.25, 0.5, 0.75, 0.75)]
                    expected = next((s for s, limit in zip((1, 2, 4, 8), limits, strict=True) if at < limit), 0)
                assert int(level[head, row, column]) == expected


def test_attention_is_one_softmax_over_keys_of_several_sizes() -> None:
    """Text, then visual tokens in blocks of which the last is short, then text."""
    query, key, value = heads(1)
    method, scale = PSA((0.25, 0.25, 0.25, 0.25), BLOCK), 0.3
    visual = [i for i in range(N) if 3 <= i < 40]
    role = torch.tensor([2 if i in visual else 4 for i in range(N)])
    tokens = type("Tokens", (), {"visual": (role == 2)[None], "role": role[None]})
    found = method.attend(query[None], key[None], value[None], tokens, scale)[0]  # type: ignore[arg-type]
    at = torch.tensor(visual)
    level = method.level(query[:, at], key[:, at], torch.arange(len(visual)) // BLOCK, scale)
    for head in range(2):
        for i in range(N):
            keys, values, sizes = [], [], []
            for j in range(i + 1):
                if i not in visual or j not in visual:
                    keys, values, sizes = [*keys, key[head, j]], [*values, value[head, j]], [*sizes, 1]
            if i in visual:
                row = visual.index(i) // BLOCK
                for column in range(row + 1):
                    size = int(level[head, row, column])
                    mine = [j for n, j in enumerate(visual) if n // BLOCK == column]
                    if size == 1:
                        mine = [j for j in mine if j <= i]
                    for start in range(0, len(mine), size or len(mine)):
                        group = mine[start : start + size]
                        if group:
                            keys.append(key[head, group].mean(0))
                            values.append(value[head, group].mean(0))
                            sizes.append(len(group))
            weights = (torch.stack(keys) @ query[head, i] * scale).exp() * torch.tensor(sizes)
            expected = (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()
            torch.testing.assert_close(found[head, i], expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_exact_is_the_stock_model(family: str) -> None:
    model: Any = tiny.build(family)
    batch = tiny.ragged_batch(family)
    plain = logits(model, batch)
    for mode in ("apply", "simulate"):
        with Plan("psa(levels=(1,0,0,0),block=8)").apply(model, mode=mode):  # type: ignore[arg-type]
            torch.testing.assert_close(logits(model, batch), plain, rtol=0, atol=1e-5)
    with Plan("psa(levels=(0,0,0.5,0),block=8)").apply(model):
        assert (logits(model, batch)[0] - plain[0]).abs().max() > 1e-4


def test_bad_settings() -> None:
    for text in ("psa(levels=(1,1))", "psa(levels=(0.5,0.5,0.5,0))", "psa(block=12)"):
        with pytest.raises(PlanError):
            Plan(text)
    with pytest.raises(PlanError, match="itself"), Plan("psa+composite").apply(tiny.build("llava")):
        pass
