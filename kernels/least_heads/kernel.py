"""`least_heads` in Triton: one program per row, which compares all heads with each other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import power_above
from mmefficient.kernels.launch import begin, launch, release


@triton.jit
def _least(
    query, along, factor, gain, q_b, q_h, q_n, rows, count,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    b = (tl.program_id(0) // rows).to(tl.int64)
    n = tl.program_id(0) % rows
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    real = h < HEADS
    inside = real[:, None] & (d < D)[None]
    x = tl.load(query + b * q_b + h[:, None] * q_h + n * q_n + d[None], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(along + (b * HEADS + h[:, None]) * D + d[None], mask=inside, other=0.0)
    to = tl.load(factor + b)
    release(OVERLAP)
    score = tl.where(real, tl.sum(x * y, 1), float("inf"))
    below = tl.sum((score[None] < score[:, None]).to(tl.int32), 1)
    tl.store(gain + (b * HEADS + h) * rows + n, tl.where(below < count, to, 1.0), mask=real)


def least_heads(query: torch.Tensor, along: torch.Tensor, factor: torch.Tensor, count: int) -> torch.Tensor:
    """See the public function."""
    batch, heads, rows, dim = query.shape
    gain = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    constants = (heads, max(16, power_above(heads)), dim, max(16, power_above(dim)))
    tensors = (query, along.contiguous(), factor.contiguous(), gain)
    numbers = (*query.stride()[:3], rows, count)
    launch(_least, (batch * rows, 1, 1), tensors, numbers, constants, num_warps=4, num_stages=1)
    return gain
