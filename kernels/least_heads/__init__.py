"""A factor on the heads whose queries point least along a direction of their own, in one launch."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.least_heads import reference

__all__ = ["least_heads"]


def least_heads(
    query: torch.Tensor, along: torch.Tensor, factor: torch.Tensor, count: int, *, impl: Impl = "auto"
) -> torch.Tensor:
    """`factor` for the `count` heads with the least query @ along in every row, 1 for the others; forward only.

    Heads that tie with the last of them get it too.

    Args:
        query: [B, H, N, D]; float16, bfloat16 or float32, any strides with the last one 1.
        along: float32 [B, H, D]; factor: float32 [B]; count: 0..H.

    Returns:
        float32 [B, H, N].

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.
    """
    batch, heads, _, dim = query.shape
    if along.shape != (batch, heads, dim) or factor.shape != (batch,) or not 0 <= count <= heads:
        shapes = f"{tuple(query.shape)}, {tuple(along.shape)} and {tuple(factor.shape)}"
        raise ValueError(f"query, along and factor of shapes {shapes} do not fit each other, or {count} of the heads.")
    if uses_triton(impl, query, along):
        from mmefficient.kernels.least_heads import kernel, op

        run = op.least_op if torch.compiler.is_compiling() else kernel.least_heads
        with launching_on(query):
            return run(query, along, factor, count)
    return reference.least_heads(query, along, factor, count)
