"""`compact` in Triton: two tensors of any dtype, head count and width in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div, power_above
from mmefficient.kernels.launch import begin, launch, release


@triton.jit
def _copy(
    x, out, keep, b, h, block, x_b, x_h, x_n, x_c, keep_b, keep_h, heads, kept,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(keep + b.to(tl.int64) * keep_b + h.to(tl.int64) * keep_h + n, mask=n < kept, other=-1).to(tl.int64)
    to = ((b * heads + h).to(tl.int64) * kept + n)[:, None] * C
    for start in tl.static_range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = x + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + row[:, None] * x_n + c[None] * x_c
        value = tl.load(at, mask=(row >= 0)[:, None] & (c < C)[None], other=0)
        tl.store(out + to + c[None], value, mask=(n < kept)[:, None] & (c < C)[None])


@triton.jit
def _compact(
    x, y, x_out, y_out, keep, x_b, x_h, x_n, x_c, y_b, y_h, y_n, y_c, keep_b, keep_h, x_heads, y_heads, kept,
    X_C: tl.constexpr, Y_C: tl.constexpr, X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    block = tl.program_id(0)
    b = tl.program_id(2)
    h = tl.program_id(1)
    if h < x_heads:
        _copy(x, x_out, keep, b, h, block, x_b, x_h, x_n, x_c, keep_b, keep_h, x_heads, kept, X_C, X_BLOCK, BLOCK_N)
    else:
        h -= x_heads
        _copy(y, y_out, keep, b, h, block, y_b, y_h, y_n, y_c, keep_b, keep_h, y_heads, kept, Y_C, Y_BLOCK, BLOCK_N)
    release(OVERLAP)


def gather_two(x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [B, Hx, N, Cx] and y [B, Hy, N, Cy] named by keep [B, H or 1, n]; zeros where keep is -1."""
    batch, kept = x.shape[0], keep.shape[2]
    outs = [torch.empty(batch, t.shape[1], kept, t.shape[3], dtype=t.dtype, device=t.device) for t in (x, y)]
    step = 16
    widths = [min(1024, power_above(t.shape[3])) for t in (x, y)]
    launch(
        _compact, (ceil_div(kept, step), x.shape[1] + y.shape[1], batch), (x, y, *outs, keep),
        (*x.stride(), *y.stride(), keep.stride(0), keep.stride(1) if keep.shape[1] > 1 else 0, x.shape[1], y.shape[1],
         kept),
        (x.shape[3], y.shape[3], *widths, step),
    )  # fmt: skip
    return outs[0], outs[1]
