"""Gradients of the kernel against those of the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mmefficient.kernels.accuracy import require
from mmefficient.kernels.grouped_attention import (
    Layout,
    causal,
    grouped_attention,
    make_layout,
    no_visual_self_attention,
    op,
)
from tests.kernels.prompts import facts, layout_for, qkv
from tests.kernels.test_grouped_attention import PATTERNS, blocks

REAL = [pytest.param(n, marks=pytest.mark.gpu) for n in (577, 2881)]


def gradients(
    impl: Any,
    layout: Layout,
    tensors: dict[str, torch.Tensor],
    sent: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """Gradients of every tensor, when the gradients `sent` arrive at the output and the log-sum-exp."""
    leaves = {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in tensors.items()}
    out, lse = grouped_attention(layout=layout, **leaves, lse=True, impl=impl)
    seen = lse.isfinite()
    total = (out * sent["out"].to(out.dtype)).sum() + (lse[seen] * sent["lse"].to(lse.dtype)[seen]).sum()
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def compare(layout: Layout, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, options: bool = False) -> None:
    tensors = dict(zip("qkv", qkv(layout, heads, kv_heads, dim, dtype), strict=True))
    q = tensors["q"]
    if options:
        tensors["bias"] = torch.randn(1, heads, layout.role.shape[1], device=q.device)
        tensors["head_gain"] = torch.rand(q.shape[0], heads, 1, device=q.device) + 0.5
    sent = {"out": torch.randn_like(q), "lse": torch.randn(q.shape[:3], device=q.device)}
    found = gradients("triton", layout, tensors, sent, None)
    eager = gradients("reference", layout, tensors, sent, None)
    exact = gradients("reference", layout, tensors, sent, torch.float64)
    assert found.keys() == eager.keys() == exact.keys() == tensors.keys()
    for name, gradient in found.items():
        assert gradient.dtype == tensors[name].dtype
        require(gradient, eager[name], exact[name], f"gradient of {name}")


@pytest.mark.parametrize("length", [47, *REAL])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(device: torch.device, pattern: str, length: int) -> None:
    layout = layout_for(PATTERNS[pattern], length, device, **blocks(length))
    compare(layout, 2, 1, 32, torch.float32 if length < 100 else torch.bfloat16)


@pytest.mark.parametrize("length", [47, *REAL])
@pytest.mark.parametrize("pattern", ["self", "window"])
def test_options(device: torch.device, pattern: str, length: int) -> None:
    """A bias for all rows of the batch, a gain per head, seven heads to a key head, D = 80."""
    layout = layout_for(PATTERNS[pattern], length, device, **blocks(length))
    compare(layout, 7, 1, 80, torch.float32 if length < 100 else torch.float16, options=True)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.gpu
def test_head_size(device: torch.device, dim: int, dtype: torch.dtype) -> None:
    compare(layout_for(None, 639, device, head_dim=dim, dtype=dtype), 2, 1, dim, dtype)


def test_two_patterns_by_head(device: torch.device) -> None:
    pair = [causal(), no_visual_self_attention("nothing")]
    heads = torch.tensor([0, 1, 1, 0], device=device)
    compare(layout_for(pair, 47, device, head_pattern=heads, blocks=(16, 16)), 4, 2, 32, torch.float32)


def test_cached_prefix_and_mask(device: torch.device) -> None:
    mask = torch.rand(3, 20, 47, device=device) < 0.5
    compare(layout_for(None, 47, device, queries=20, mask=mask, blocks=(16, 16)), 2, 1, 32, torch.float32)


def test_packed_sequences(device: torch.device) -> None:
    ends = torch.tensor([0, 17, 18, 48], device=device)
    layout = make_layout(torch.full((1, 48), 4, device=device), cu_seqlens=ends, blocks=(16, 16), impl="triton")
    compare(layout, 2, 1, 32, torch.float32)


def test_layers_share_the_lists_of_pairs(device: torch.device) -> None:
    """A layout that is taken apart for torch comes back as itself, with what earlier calls made."""
    layout = make_layout(torch.full((1, 20), 4, device=device), blocks=(16, 16), impl="triton")
    q = torch.randn(1, 1, 20, 16, device=device, requires_grad=True)
    assert layout.schedule is not None
    for _ in range(2):
        out = grouped_attention(q, q, q, layout, impl="triton")
        assert torch.is_tensor(out)
        out.sum().backward()
        lists = [value for key, value in layout.schedule.launches.items() if key[0] == "pairs"]
        assert len(lists) == 1
    assert op.unpack(*op.pack(layout)) is layout
    other = dataclasses.replace(layout, rules=layout.rules.clone())
    assert op.unpack(*op.pack(other)).rules is other.rules
    assert op.unpack(*op.pack(layout)).rules is layout.rules


def test_what_has_no_backward_says_so(device: torch.device) -> None:
    layout = make_layout(**facts(20, device), impl="triton")
    q, k, v = qkv(layout, 2, 1, 32, torch.float32)
    maps = torch.ones(3, 1, 2, layout.groups, device=device)
    for extra in ({"partials": True}, {"logit_map": maps}):
        with pytest.raises(RuntimeError, match="no backward"):
            grouped_attention(q.requires_grad_(), k, v, layout, impl="triton", **extra)  # type: ignore[call-overload]


def test_compiles_whole(device: torch.device) -> None:
    layout = layout_for(no_visual_self_attention(), 33, device, blocks=(16, 16))
    q, k, v = qkv(layout, 2, 1, 32, torch.float32)

    def step(q: torch.Tensor, impl: Any) -> torch.Tensor:
        return grouped_attention(2 * q, k, v, layout, impl=impl).square().sum()

    found = []
    for call, impl in ((torch.compile(step, fullgraph=True, backend="aot_eager"), "triton"), (step, "reference")):
        leaf = q.detach().clone().requires_grad_()
        call(leaf, impl).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
