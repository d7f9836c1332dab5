"""`rope_store` in Triton: a program takes some heads of one token, of q, of k or of v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div, power_above
from mmefficient.kernels.launch import begin, launch, release

BLOCK_H = 8


@triton.jit
def _turn(
    x, x_h, y, y_h, at_angle, cos, sin, h, heads, HALF: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr
):  # fmt: skip
    """Heads h of one token from x to y, rotated or as they are."""
    d = tl.arange(0, BLOCK)
    inside = (h < heads)[:, None] & (d < HALF)[None]
    at_x = x + h[:, None].to(tl.int64) * x_h + d[None]
    at_y = y + h[:, None].to(tl.int64) * y_h + d[None]
    low = tl.load(at_x, mask=inside, other=0.0)
    high = tl.load(at_x + HALF, mask=inside, other=0.0)
    if ROTATE:
        low, high = low.to(tl.float32), high.to(tl.float32)
        cos += at_angle + d
        sin += at_angle + d
        cos_low = tl.load(cos, mask=d < HALF, other=0.0).to(tl.float32)[None]
        sin_low = tl.load(sin, mask=d < HALF, other=0.0).to(tl.float32)[None]
        cos_high = tl.load(cos + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None]
        sin_high = tl.load(sin + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None]
        low, high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    tl.store(at_y, low.to(y.dtype.element_ty), mask=inside)
    tl.store(at_y + HALF, high.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rope_store(
    q, k, v, cos, sin, k_cache, v_cache, slots, out, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, angle_b, angle_n,
    kc_b, kc_h, kc_n, vc_b, vc_h, vc_n, rows, heads, kv_heads, q_blocks, k_blocks,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    b = (tl.program_id(0) // rows).to(tl.int64)
    n = tl.program_id(0) % rows
    block = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    angle = b * angle_b + n * angle_n
    slot = tl.load(slots + b).to(tl.int64) + n
    if block < q_blocks:
        y = out + (b * rows + n) * heads * 2 * HALF
        x = q + b * q_b + n.to(tl.int64) * q_n
        _turn(x, q_h, y, 2 * HALF, angle, cos, sin, block * BLOCK_H + h, heads, HALF, BLOCK, True)
    elif block < q_blocks + k_blocks:
        x = k + b * k_b + n.to(tl.int64) * k_n
        y = k_cache + b * kc_b + slot * kc_n
        _turn(x, k_h, y, kc_h, angle, cos, sin, (block - q_blocks) * BLOCK_H + h, kv_heads, HALF, BLOCK, True)
    else:
        x = v + b * v_b + n.to(tl.int64) * v_n
        y = v_cache + b * vc_b + slot * vc_n
        h += (block - q_blocks - k_blocks) * BLOCK_H
        _turn(x, v_h, y, vc_h, angle, cos, sin, h, kv_heads, HALF, BLOCK, False)
    release(OVERLAP)


def rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """See the public function."""
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(batch, rows, heads, dim, dtype=q.dtype, device=q.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    q_blocks, k_blocks = ceil_div(heads, BLOCK_H), ceil_div(kv_heads, BLOCK_H)
    launch(
        _rope_store, (batch * rows, q_blocks + 2 * k_blocks, 1), (q, k, v, cos, sin, k_cache, v_cache, slots, out),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
         *k_cache.stride()[:3], *v_cache.stride()[:3], rows, heads, kv_heads, q_blocks, k_blocks),
        (dim // 2, power_above(dim // 2), BLOCK_H),
        num_warps=1 if dim <= 128 else 2,
    )  # fmt: skip
    return out.transpose(1, 2)
