"""`decode_linear` in Triton: weights stream through once, everything else is small and found in the caches.

One row multiplies and adds vectors, and threads meet once at the end; more rows, padded to 16, multiply matrices. The
norm costs no pass: products are taken with x * norm and scaled afterwards by the root mean square found on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.launch import launch


@triton.jit
def _one(x, w, u, norm, at_w, at_u, in_n, eps, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
         OVERLAP: tl.constexpr):  # fmt: skip
    """One row against BLOCK_N rows of w, and of u if GATED; both in float32."""
    if AHEAD:
        k = tl.arange(0, BLOCK_K)
        inside = in_n[:, None] & (k < K)[None]
        y = tl.load(w + at_w[:, None] + k[None], mask=inside, other=0.0, eviction_policy="evict_first")
        z = y
        if GATED:
            z = tl.load(u + at_u[:, None] + k[None], mask=inside, other=0.0, eviction_policy="evict_first")
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        square = tl.zeros([BLOCK_K], tl.float32)
        for first in tl.range(0, K, BLOCK_K):
            at = first + BLOCK_K + k
            inside = in_n[:, None] & (at < K)[None]
            y_next = tl.load(w + at_w[:, None] + at[None], mask=inside, other=0.0, eviction_policy="evict_first")
            z_next = y_next
            if GATED:
                z_next = tl.load(u + at_u[:, None] + at[None], mask=inside, other=0.0, eviction_policy="evict_first")
            a = tl.load(x + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            if NORM:
                square += a * a
                a *= tl.load(norm + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            acc += y.to(tl.float32) * a[None]
            if GATED:
                up += z.to(tl.float32) * a[None]
            y = y_next
            z = z_next
        scale = 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(square, 0) / K + eps)
        return (tl.sum(acc, 1) * scale)[None], (tl.sum(up, 1) * scale)[None]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        inside = in_n[:, None] & (k < K)[None]
        y = tl.load(w + at_w[:, None] + k[None], mask=inside, other=0.0, eviction_policy="evict_first")
        if GATED:
            z = tl.load(u + at_u[:, None] + k[None], mask=inside, other=0.0, eviction_policy="evict_first")
        a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            square += a * a
            a *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        acc += y.to(tl.float32) * a[None]
        if GATED:
            up += z.to(tl.float32) * a[None]
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(square, 0) / K + eps)
    return (tl.sum(acc, 1) * scale)[None], (tl.sum(up, 1) * scale)[None]


@triton.jit
def _few(x, x_m, w, u, norm, at_w, at_u, in_n, m, rows, eps, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
         OVERLAP: tl.constexpr):  # fmt: skip
    """Up to BLOCK_M rows against BLOCK_N rows of w, and of u if GATED; both in float32."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = in_n[None] & (k < K)[:, None]
        y = tl.load(w + at_w[None] + k[:, None], mask=inside, other=0.0, eviction_policy="evict_first")
        a = tl.load(x + m[:, None] * x_m + k[None], mask=(m < rows)[:, None] & (k < K)[None], other=0.0)
        if NORM:
            square += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
            a = a * tl.load(norm + k, mask=k < K, other=0.0)[None]
        acc = tl.dot(a, y, acc, input_precision=PRECISION)
        if GATED:
            z = tl.load(u + at_u[None] + k[:, None], mask=inside, other=0.0, eviction_policy="evict_first")
            up = tl.dot(a, z, up, input_precision=PRECISION)
    if NORM:
        scale = tl.rsqrt(square / K + eps)[:, None]
        acc *= scale
        up *= scale
    return acc, up


@triton.jit
def _linear(
    x, w0, w1, w2, b0, b1, b2, norm, residual, out, x_m, w0_n, w1_n, w2_n, r_m, out_m, n0, n1, n2, rows, eps,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, BIASED0: tl.constexpr,
    BIASED1: tl.constexpr, BIASED2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    w, w_n, size, column = w0, w0_n, n0, 0
    which = 0
    if not GATED:
        if block >= blocks0 + blocks1:
            w, w_n, size, column, which = w2, w2_n, n2, n0 + n1, 2
            block -= blocks0 + blocks1
        elif block >= blocks0:
            w, w_n, size, column, which = w1, w1_n, n1, n0, 1
            block -= blocks0
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < size
    at_w = n.to(tl.int64) * w_n
    at_u = n.to(tl.int64) * w1_n
    if BLOCK_M == 1:
        y, up = _one(x, w, w1, norm, at_w, at_u, in_n, eps, K, NORM, GATED, BLOCK_N, BLOCK_K, STAGES, AHEAD, OVERLAP)
    else:
        y, up = _few(x, x_m, w, w1, norm, at_w, at_u, in_n, m, rows, eps, K, NORM, GATED,
                     BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, OVERLAP)  # fmt: skip
    if BIASED0 and which == 0:
        y += tl.load(b0 + n, mask=in_n, other=0.0).to(tl.float32)[None]
    if BIASED1 and which == 1:
        y += tl.load(b1 + n, mask=in_n, other=0.0).to(tl.float32)[None]
    if BIASED2 and which == 2:
        y += tl.load(b2 + n, mask=in_n, other=0.0).to(tl.float32)[None]
    if GATED:
        if BIASED1:
            up += tl.load(b1 + n, mask=in_n, other=0.0).to(tl.float32)[None]
        y = y * up / (1.0 + tl.exp(-y))
    inside = (m < rows)[:, None] & in_n[None]
    if RESIDUAL:
        y += tl.load(residual + m[:, None] * r_m + (column + n)[None], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m[:, None] * out_m + (column + n)[None], y.to(out.dtype.element_ty), mask=inside)


def tuning(rows: int, size: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps for `rows` rows and `size` outputs."""
    if rows == 1:
        return {"BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": 1024, "num_warps": 4, "STAGES": 1}
    narrow = dtype == torch.float32
    return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64 if narrow else 128, "num_warps": 4, "num_stages": 4}


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
    flat = x.reshape(-1, width)
    weights = [w if w.stride(1) == 1 else w.contiguous() for w in weights]
    sizes = [w.shape[0] for w in weights]
    total = sizes[0] if gated else sum(sizes)
    rows = flat.shape[0]
    out = torch.empty(rows, total, dtype=x.dtype, device=x.device)
    added = out if residual is None else residual.reshape(rows, total)
    settings = {"STAGES": 1, "AHEAD": False} | tuning(rows, total, x.dtype) | override
    blocks = sum(triton.cdiv(n, settings["BLOCK_N"]) for n in (sizes[:1] if gated else sizes))
    spare = 3 - len(weights)
    three = [*weights, *weights[:1] * spare]
    bias = [*biases, *[None] * spare]
    launch(
        _linear, (blocks, 1, 1),
        (flat, *three, *(three[0] if b is None else b for b in bias), flat if norm is None else norm, added, out),
        (flat.stride(0), *(w.stride(0) for w in three), added.stride(0), total, *sizes, *[0] * spare, rows, eps),
        (width, norm is not None, gated, residual is not None, *(b is not None for b in bias), settings.pop("BLOCK_M"),
         settings.pop("BLOCK_N"), settings.pop("BLOCK_K"), settings.pop("STAGES"),
         "ieee" if x.dtype == torch.float32 else "tf32", settings.pop("AHEAD"), settings.get("launch_pdl", False)),
        **settings,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], total)
