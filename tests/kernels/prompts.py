"""Prompts as the layout builder takes them, and what has to hold of any result."""

from __future__ import annotations

from typing import Any

import torch

from mmefficient.kernels.accuracy import require
from mmefficient.kernels.grouped_attention import Layout, Pattern, grouped_attention, make_layout


def facts(length: int, device: torch.device, batch: int = 3) -> dict[str, Any]:
    """Three rows: two pages after a short system text; left padding and the image elsewhere; no image at all."""
    role = torch.full((batch, length), 4)
    page, row, col = (torch.full((batch, length), -1) for _ in range(3))
    for b in range(min(batch, 2)):
        first = min(5 + 4 * b, length - 1)
        role[b, :first] = 1
        count = max(length * 2 // 3 - first, 0)
        each, width = max(count // 2, 1), max(int((count // 2) ** 0.5), 1)
        at = torch.arange(count)
        role[b, first : first + count] = 2
        page[b, first : first + count] = at // each
        row[b, first : first + count] = at % each // width
        col[b, first : first + count] = at % each % width
    role[1:2, : min(3, length - 1)] = 0
    group = torch.where(role == 2, 1, torch.where(role == 1, 2, 0))
    found = {"role": role, "page": page, "row": row, "col": col, "group": group}
    return {name: value.to(device) for name, value in found.items()} | {"groups": 3}


def qkv(layout: Layout, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random q, k and v; memory of q in the order [B, N, H, D], as models have it."""
    (batch, rows), keys, device = layout.queries.shape, layout.role.shape[1], layout.role.device
    q = torch.randn(batch, rows, heads, dim, device=device, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, keys, dim, device=device, dtype=dtype) for _ in range(2))
    return q, k, v


def options(layout: Layout, heads: int) -> dict[str, torch.Tensor]:
    """Every optional argument, none of them neutral."""
    (batch, rows), keys, device = layout.queries.shape, layout.role.shape[1], layout.role.device
    return {
        "bias": torch.randn(batch, heads, keys, device=device),
        "logit_map": torch.randn(3, 1, heads, layout.groups, device=device),
        "head_gain": torch.rand(1, heads, rows, device=device) + 0.5,
    }


def compare(kernel: Any, layout: Layout, tensors: tuple[torch.Tensor, ...], **given: Any) -> None:
    """The kernel is as accurate as the reference in the same dtype, both measured against the reference in float64."""
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in given.items()}
    found = kernel(grouped_attention, *tensors, layout, **given, lse=True)
    eager = grouped_attention(*tensors, layout, **given, lse=True, impl="reference")
    exact = grouped_attention(*(t.double() for t in tensors), layout, **wide, lse=True, impl="reference")
    require(found[0], eager[0], exact[0])
    seen = exact[1].isfinite()
    assert torch.equal(found[1].isfinite(), seen)
    assert not found[1].isnan().any()
    require(found[1][seen], eager[1][seen], exact[1][seen], "log-sum-exp")


def layout_for(pattern: Pattern | list[Pattern] | None, length: int, device: torch.device, **extra: Any) -> Layout:
    return make_layout(**{**facts(length, device), **extra}, pattern=pattern, impl="triton")
