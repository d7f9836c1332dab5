"""`key_scores` against a full attention map in float64."""

from __future__ import annotations

import pytest
import torch

from mmefficient.kernels.key_scores import key_scores


def full_map(query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax of all logits [B, Hq, R, K] in float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("masked", ["", "bool", "additive", "shared"])
def test_equals_the_full_map(heads: tuple[int, int], rows: int, masked: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, heads[0], rows, 8), torch.randn(2, heads[1], 37, 8)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1 if masked == "shared" else rows, 37) > 0.3
        if masked == "additive":
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
    scores = key_scores(query, key, scale=0.3, mask=mask)
    assert scores.dtype == torch.float32
    expected = full_map(query, key, 0.3, mask).mean(2)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, heads[0]))


def test_softmax_is_float32_for_half_inputs() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 1, 64).bfloat16(), torch.randn(1, 2, 512, 64).bfloat16()
    scores = key_scores(query, key, scale=0.125)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 2))


def test_a_row_that_sees_nothing_adds_nothing() -> None:
    query, key = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 4, 8)
    mask = torch.tensor([[True] * 4, [False] * 4])[None, None]
    alone = key_scores(query[:, :, :1], key, scale=1.0)
    torch.testing.assert_close(key_scores(query, key, scale=1.0, mask=mask), alone / 2)
