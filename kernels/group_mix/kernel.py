"""`group_mix` in Triton: one program per row and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import power_above
from mmefficient.kernels.launch import begin, launch, release


@triton.jit
def _mix(
    out, lse, where, move, least, mixed, o_g, o_b, o_h, o_n, where_b, where_h, heads, rows, lines,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, CONDITIONS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    line = tl.program_id(0).to(tl.int64)
    n = line % rows
    h = line // rows % heads
    b = line // (rows * heads)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    real = g < GROUPS
    level = tl.load(lse + g * lines + line, mask=real, other=float("-inf"))
    top = tl.max(level, 0)
    weight = tl.exp(level - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    mass = weight / tl.where(total == 0, 1.0, total)
    acts = tl.load(where + b * where_b + h * where_h) != 0
    for c in tl.static_range(CONDITIONS):
        row = least + c * (GROUPS + 1)
        reached = tl.sum(tl.load(row + g, mask=real, other=0.0) * mass, 0)
        acts = acts & (reached >= tl.load(row + GROUPS))
    table = tl.load(move + g[:, None] * GROUPS + g[None], mask=real[:, None] & real[None], other=0.0)
    mass = tl.where(acts, tl.sum(table * mass[None], 1), mass)
    at = out + g[:, None] * o_g + b * o_b + h * o_h + n * o_n + d[None]
    parts = tl.load(at, mask=real[:, None] & (d < D)[None], other=0.0)
    release(OVERLAP)
    found = tl.sum(parts * mass[:, None], 0)
    to = mixed + ((b * rows + n) * heads + h) * D + d
    tl.store(to, found.to(mixed.dtype.element_ty), mask=d < D)


def group_mix(
    out: torch.Tensor,
    lse: torch.Tensor,
    where: torch.Tensor,
    move: torch.Tensor,
    least: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See the public function."""
    groups, batch, heads, rows, dim = out.shape
    mixed = torch.empty(batch, rows, heads, dim, dtype=dtype, device=out.device)
    where = where.expand(batch, heads).view(torch.int8)
    lines = batch * heads * rows
    numbers = (*out.stride()[:4], *where.stride(), heads, rows, lines)
    constants = (groups, power_above(groups), len(least), dim, max(16, power_above(dim)))
    tensors = (out, lse.contiguous(), where, move.contiguous(), least.contiguous(), mixed)
    launch(_mix, (lines, 1, 1), tensors, numbers, constants, num_warps=2, num_stages=1)
    return mixed.transpose(1, 2)
