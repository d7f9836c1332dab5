"""Attention under a pattern of pairs, with keys in groups: one op for every method that changes attention."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, uses_triton
from mmefficient.kernels.grouped_attention import reference
from mmefficient.kernels.grouped_attention.layout import Layout, make_layout
from mmefficient.kernels.grouped_attention.pattern import (
    Pattern,
    causal,
    image_sees_question,
    no_visual_self_attention,
    pages_apart,
    window,
)

__all__ = [
    "Layout",
    "Pattern",
    "causal",
    "grouped_attention",
    "image_sees_question",
    "make_layout",
    "no_visual_self_attention",
    "pages_apart",
    "window",
]


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    *,
    bias: torch.Tensor | None = None,
    logit_map: torch.Tensor | None = None,
    head_gain: torch.Tensor | None = None,
    scale: float | None = None,
    partials: bool = False,
    lse: bool = False,
    impl: Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x"""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if uses_triton(impl, q):
        from mmefficient.kernels.grouped_attention.kernel import grouped_attention as run

        out, found = run(q, k, v, layout, bias, logit_map, head_gain, scale, partials, lse or partials)
    else:
        out, found = reference.grouped_attention(q, k, v, layout, bias, logit_map, head_gain, scale, partials)
    return (out, found) if lse or partials else out
