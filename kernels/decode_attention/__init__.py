"""Attention of a few new tokens over a stored cache: split-K, capturable in a CUDA graph."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, uses_triton
from mmefficient.kernels.decode_attention import reference

__all__ = ["decode_attention"]

MAX_NEW = 8


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    groups: int = 4,
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
    parts = groups if partials else 0
    run = reference.decode_attention
    if uses_triton(impl, q):
        from mmefficient.kernels.decode_attention.op import decode_op as run
    out, found = run(q, k, v, lengths, starts, group, parts, bias, logit_map, head_gain, scale)
    return (out, found) if lse or partials else out
