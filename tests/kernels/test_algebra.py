"""What partial results are for: other mixes of the same groups, checked on explicit attention matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels.group_mix import group_mix
from mmefficient.kernels.grouped_attention import (
    Layout,
    causal,
    grouped_attention,
    make_layout,
    masses,
    mix,
    no_visual_self_attention,
    reference,
)
from tests.kernels.prompts import facts, qkv

LENGTH, LAST = 33, 6
IMPLS = ["reference", "triton"]
close = {"atol": 1e-5, "rtol": 1e-5}


def prompt(group: torch.Tensor, groups: int) -> tuple[Layout, tuple[torch.Tensor, ...], torch.Tensor]:
    """Two rows with an image, the last rows asking; q, k, v; and the attention matrix [B, H, LAST, LENGTH]."""
    given: dict[str, Any] = {**facts(LENGTH, group.device, batch=2), "group": group, "groups": groups}
    layout = make_layout(**given, queries=LAST, blocks=(16, 16), impl="triton")
    q, k, v = qkv(layout, 4, 2, 32, torch.float32)
    return layout, (q, k, v), reference.logits(q, k, layout, None, None, 32**-0.5).softmax(-1)


def applied(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return weights @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pattern", [causal(), no_visual_self_attention()])
def test_own_masses_give_plain_attention(device: torch.device, impl: Any, pattern: Any) -> None:
    layout = make_layout(**facts(LENGTH, device), pattern=pattern, blocks=(16, 16), impl="triton")
    tensors = qkv(layout, 2, 1, 32, torch.float32)
    out, lse = grouped_attention(*tensors, layout, partials=True, impl=impl)
    plain, whole = grouped_attention(*tensors, layout, lse=True, impl=impl)
    torch.testing.assert_close(mix(out, lse), plain, **close)
    torch.testing.assert_close(lse.logsumexp(0), whole, **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_var(device: torch.device, impl: Any) -> None:
    """Visual tokens that are no sinks receive what sinks lose: arXiv 2503.03321, o' = o + (1 - p) m_S (o_V - o_S)."""
    role = facts(LENGTH, device, batch=2)["role"]
    at = torch.arange(LENGTH, device=device)
    sink = (at % 7 == 0).expand_as(role)
    visual = (role == 2) & ~sink
    layout, (q, k, v), weights = prompt(torch.where(sink, 2, torch.where(visual, 1, 0)), 3)
    sink, visual, keep = sink[:, None, None], visual[:, None, None], 0.6
    lost = (1 - keep) * (weights * sink).sum(-1, keepdim=True)
    share = weights * visual / (weights * visual).sum(-1, keepdim=True)
    wanted = applied(torch.where(sink, keep * weights, weights) + lost * share, v)
    out, lse = grouped_attention(q, k, v, layout, partials=True, impl=impl)
    mass = masses(lse)
    torch.testing.assert_close(mix(out, lse, mass + mass[2] * (1 - keep) * _step(device, 0, 1, -1)), wanted, **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_act(device: torch.device, impl: Any) -> None:
    """All other keys receive what sinks lose, in proportion: arXiv 2406.15765."""
    sink = ((torch.arange(LENGTH, device=device) - 1) % 9 == 4).expand(2, -1)
    layout, (q, k, v), weights = prompt(sink.int(), 2)
    mine, keep = weights * sink[:, None, None], 0.4
    rest = weights - mine
    spread = (1 - keep) * mine.sum(-1, keepdim=True) * rest / rest.sum(-1, keepdim=True)
    out, lse = grouped_attention(q, k, v, layout, partials=True, impl=impl)
    mass = masses(lse)
    found = mix(out, lse, mass + mass[1] * (1 - keep) * _step(device, 1, -1))
    torch.testing.assert_close(found, applied(keep * mine + rest + spread, v), **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_adhh(device: torch.device, impl: Any) -> None:
    """Heads whose mass on text after the image reaches a threshold lose that part of their output, unnormalised."""
    role = facts(LENGTH, device, batch=2)["role"]
    after = role == 4
    layout, (q, k, v), weights = prompt(after.int(), 2)
    mine = weights * after[:, None, None]
    threshold = mine.sum(-1, keepdim=True).median()
    wanted = applied(torch.where(mine.sum(-1, keepdim=True) >= threshold + 1e-4, weights - mine, weights), v)
    out, lse = grouped_attention(q, k, v, layout, partials=True, impl=impl)
    mass = masses(lse)
    mass[1] = mass[1].where(mass[1] < threshold + 1e-4, 0.0)
    torch.testing.assert_close(mix(out, lse, mass), wanted, **close)


def _step(device: torch.device, *sign: int) -> torch.Tensor:
    return torch.tensor(sign, device=device)[:, None, None, None]


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("each", [False, True])
def test_group_mix(kernel: Any, device: torch.device, groups: int, each: bool) -> None:
    """Masses change where heads, batch rows and all conditions say so; groups, and whole rows, may be empty."""
    out = torch.randn(groups, 2, 5, 3, 40, device=device).transpose(2, 3).contiguous().transpose(2, 3)
    lse = torch.randn(groups, 2, 5, 3, device=device) * 2
    lse[0, 0, 1], lse[:, 1, 2] = float("-inf"), float("-inf")
    where = torch.rand(2, 5 if each else 1, device=device) < 0.7
    where[0] = True
    move, least = torch.rand(groups, groups, device=device), torch.zeros(2, groups + 1, device=device)
    least[0, 0] = least[1, 1] = 1.0
    least[:, -1] = 0.15
    found = kernel(group_mix, out, lse, where, move, least, dtype=torch.float16)
    mass = masses(lse)
    acts = where[..., None].expand(2, 5, 3).clone()
    for *factors, bound in least.tolist():
        acts &= sum(f * m for f, m in zip(factors, mass, strict=True)) >= bound
    assert 0 < acts.sum() < acts.numel()
    wanted = mix(out, lse, torch.where(acts, torch.einsum("gk,kbhn->gbhn", move, mass), mass))
    torch.testing.assert_close(found.float(), wanted, atol=2e-3, rtol=2e-3)
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(group_mix(out, lse, where, move, least, dtype=torch.float32, impl="reference"), wanted)
    with pytest.raises(ValueError, match="do not fit"):
        group_mix(out, lse, where[:1], move, least, dtype=torch.float32)
