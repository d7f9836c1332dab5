"""`decode_linear` in Triton: weights stream through once, everything else is small and found in the caches.

A program takes a few rows of the weights, multiplies and adds vectors, and its threads meet once at the end. The norm
costs no pass: products are taken with x * norm and scaled afterwards by the root mean square found on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div
from mmefficient.kernels.decode_linear.rows import decode_rows
from mmefficient.kernels.launch import begin, launch, release
from mmefficient.kernels.rms_norm.kernel import rms_norm


@triton.jit
def _linear(
    x, w0, w1, w2, b0, b1, b2, norm, residual, out, w0_n, w1_n, w2_n, n0, n1, n2, eps,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIASED0: tl.constexpr,
    BIASED1: tl.constexpr, BIASED2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
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
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_n = n < size
    at_w = w + n.to(tl.int64)[:, None] * w_n + k[None]
    at_u = w1 + n.to(tl.int64)[:, None] * w1_n + k[None]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_k = first + k < K
        inside = in_n[:, None] & in_k[None]
        y = tl.load(at_w + first, mask=inside, other=0.0, eviction_policy="evict_first")
        if GATED:
            z = tl.load(at_u + first, mask=inside, other=0.0, eviction_policy="evict_first")
        a = tl.load(x + first + k, mask=in_k, other=0.0).to(tl.float32)
        if NORM:
            square += a * a
            a *= tl.load(norm + first + k, mask=in_k, other=0.0).to(tl.float32)
        acc += y.to(tl.float32) * a[None]
        if GATED:
            up += z.to(tl.float32) * a[None]
    release(OVERLAP)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(square, 0) / K + eps)
    result = tl.sum(acc, 1) * scale
    if BIASED0:
        result += tl.load(b0 + n, mask=in_n & (which == 0), other=0.0).to(tl.float32)
    if BIASED1 and not GATED:
        result += tl.load(b1 + n, mask=in_n & (which == 1), other=0.0).to(tl.float32)
    if BIASED2:
        result += tl.load(b2 + n, mask=in_n & (which == 2), other=0.0).to(tl.float32)
    if GATED:
        raised = tl.sum(up, 1) * scale
        if BIASED1:
            raised += tl.load(b1 + n, mask=in_n, other=0.0).to(tl.float32)
        result = result * raised / (1.0 + tl.exp(-result))
    if RESIDUAL:
        result += tl.load(residual + column + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(out + column + n, result.to(out.dtype.element_ty), mask=in_n)


def tuning(norm: bool, gated: bool) -> dict[str, int]:
    """Block sizes, warps and stages, as measured; two weights at a time take half as many rows of each."""
    return {"BLOCK_N": 4 if gated else 8, "BLOCK_K": 1024 if norm else 512, "STAGES": 3, "num_warps": 4}


def decode_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
    **override: int,
) -> torch.Tensor:
    """See the public function. `override`: what `tuning` gives, in place of the defaults."""
    width = x.shape[-1]
    if x.numel() > width:
        x = x if norm is None else rms_norm(x, norm, eps, None)[0]
        return decode_rows(x, weights, biases, gated, residual, **override)
    x = x if x.stride(-1) == 1 else x.contiguous()
    weights = [w if w.stride(1) == 1 else w.contiguous() for w in weights]
    sizes = [w.shape[0] for w in weights]
    total = sizes[0] if gated else sum(sizes)
    out = torch.empty(*x.shape[:-1], total, dtype=x.dtype, device=x.device)
    settings = tuning(norm is not None, gated) | override
    step = settings.pop("BLOCK_N")
    blocks = sum(ceil_div(n, step) for n in (sizes[:1] if gated else sizes))
    spare = 3 - len(weights)
    three, bias = [*weights, *weights[:1] * spare], [*biases, *[None] * spare]
    added = out if residual is None else residual.contiguous()
    launch(
        _linear, (blocks, 1, 1),
        (x, *three, *(out if b is None else b for b in bias), x if norm is None else norm, added, out),
        (*(w.stride(0) for w in three), *sizes, *[0] * spare, float(eps)),
        (width, norm is not None, gated, residual is not None, *(b is not None for b in bias), step,
         settings.pop("BLOCK_K"), settings.pop("STAGES")),
        **settings,
    )  # fmt: skip
    return out
