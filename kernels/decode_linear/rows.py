"""`decode_linear` in Triton for a few rows: weights stream through once, the rows fill one tile of the tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div
from mmefficient.kernels.launch import begin, launch, release

TILE = 16
"""Rows of the smallest tile that tensor cores multiply; fewer are filled up."""


@triton.jit
def _rows(
    x, w0, w1, w2, b0, b1, b2, residual, out, x_m, w0_n, w1_n, w2_n, n0, n1, n2, rows, columns,
    K: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIASED0: tl.constexpr, BIASED1: tl.constexpr,
    BIASED2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    block = tl.program_id(0)
    w, w_n, size, column, which = w0, w0_n, n0, 0, 0
    if not GATED:
        before1 = tl.cdiv(n0, BLOCK_N)
        before2 = before1 + tl.cdiv(n1, BLOCK_N)
        if block >= before2:
            w, w_n, size, column, which = w2, w2_n, n2, n0 + n1, 2
            block -= before2
        elif block >= before1:
            w, w_n, size, column, which = w1, w1_n, n1, n0, 1
            block -= before1
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = m < rows, n < size
    at_x = x + m[:, None] * x_m + k[None]
    at_w = w + n.to(tl.int64)[None] * w_n + k[:, None]
    at_u = w1 + n.to(tl.int64)[None] * w1_n + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_k = first + k < K
        inside = in_k[:, None] & in_n[None]
        a = tl.load(at_x + first, mask=in_m[:, None] & in_k[None], other=0.0)
        y = tl.load(at_w + first, mask=inside, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(a, y, acc, input_precision=PRECISION)
        if GATED:
            z = tl.load(at_u + first, mask=inside, other=0.0, eviction_policy="evict_first")
            up = tl.dot(a, z, up, input_precision=PRECISION)
    release(OVERLAP)
    if BIASED0:
        acc += tl.load(b0 + n, mask=in_n & (which == 0), other=0.0).to(tl.float32)[None]
    if BIASED1 and not GATED:
        acc += tl.load(b1 + n, mask=in_n & (which == 1), other=0.0).to(tl.float32)[None]
    if BIASED2:
        acc += tl.load(b2 + n, mask=in_n & (which == 2), other=0.0).to(tl.float32)[None]
    if GATED:
        if BIASED1:
            up += tl.load(b1 + n, mask=in_n, other=0.0).to(tl.float32)[None]
        acc = acc * up / (1.0 + tl.exp(-acc))
    at = m[:, None] * columns + column + n[None]
    inside = in_m[:, None] & in_n[None]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


def tuning(gated: bool) -> dict[str, int]:
    """Block sizes, warps and stages, as measured at 8 rows of a 7B model."""
    return {"BLOCK_N": 32, "BLOCK_K": 128 if gated else 256, "STAGES": 4, "num_warps": 4}


def decode_rows(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    gated: bool,
    residual: torch.Tensor | None,
    **override: int,
) -> torch.Tensor:
    """See the public function; at most `TILE` rows, and no norm. `override`: what `tuning` gives."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    weights = [w if w.stride(1) == 1 else w.contiguous() for w in weights]
    sizes = [w.shape[0] for w in weights]
    total = sizes[0] if gated else sum(sizes)
    out = torch.empty(*x.shape[:-1], total, dtype=x.dtype, device=x.device)
    settings = tuning(gated) | override
    step, block_k, stages = settings.pop("BLOCK_N"), settings.pop("BLOCK_K"), settings.pop("STAGES")
    if x.dtype == torch.float32:  # a tile takes twice the memory
        block_k //= 2
    spare = 3 - len(weights)
    three, bias = [*weights, *weights[:1] * spare], [*biases, *[None] * spare]
    launch(
        _rows, (sum(ceil_div(n, step) for n in (sizes[:1] if gated else sizes)), 1, 1),
        (flat, *three, *(out if b is None else b for b in bias), out if residual is None else residual.contiguous(),
         out),
        (flat.stride(0), *(w.stride(0) for w in three), *sizes, *[0] * spare, len(flat), total),
        (width, gated, residual is not None, *(b is not None for b in bias), TILE, step, block_k, stages,
         "ieee" if x.dtype == torch.float32 else "tf32"),
        **settings,
    )  # fmt: skip
    return out
