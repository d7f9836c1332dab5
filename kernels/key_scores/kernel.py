"""`key_scores` in Triton.

One row: keys are read once, by a program per block of keys that writes logits; the program that finishes a row last
turns them into probabilities. Several rows: log-sum-exps of the rows over parts of the keys, then the probabilities,
summed over rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mmefficient.kernels.arrivals import counters
from mmefficient.kernels.common import ceil_div, power_above, processors
from mmefficient.kernels.launch import begin, launch, release


@triton.jit
def _logits(
    x, key, n_row, k, k_n, mask, mask_n, mask_k, last, keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, rows,
):  # fmt: skip
    """Base-2 logits of a block of rows against a block of keys."""
    d = tl.arange(0, BLOCK_D)
    real = key < keys
    y = tl.load(k + key[None].to(tl.int64) * k_n + d[:, None], mask=real[None] & (d < D)[:, None], other=0.0)
    s = tl.dot(x, y, input_precision=PRECISION) * (scale * 1.4426950408889634)
    inside = (n_row < rows)[:, None] & real[None]
    ok = inside
    if LAST:
        ok = ok & (key[None] <= tl.load(last + n_row, mask=n_row < rows, other=-1)[:, None])
    if MASK > 0:
        value = tl.load(mask + n_row[:, None].to(tl.int64) * mask_n + key[None] * mask_k, mask=inside, other=0)
        if MASK == 1:
            ok = ok & (value != 0)
        else:
            s += value.to(tl.float32) * 1.4426950408889634
    return tl.where(ok, s, float("-inf"))


@triton.jit
def _one_row(
    q, k, out, stats, arrived, mask, last, lse, q_b, q_h, k_b, k_h, k_n, mask_b, mask_h, mask_k, kv_heads, keys, scale,
    REPEAT: tl.constexpr, MASK: tl.constexpr, LAST: tl.constexpr, LSE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, SPAN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of keys against the query heads that share it; stats is [B, Hkv, REPEAT, 2, blocks], base 2."""
    begin(OVERLAP)
    block, blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1)
    b, kv = row // kv_heads, row % kv_heads
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    real = key < keys
    k += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    y = tl.load(k + key[:, None].to(tl.int64) * k_n + d[None], mask=real[:, None] & (d < D)[None], other=0.0)
    ok = real
    if LAST:
        ok = ok & (key <= tl.load(last + b))
    for r in tl.static_range(REPEAT):
        h = kv * REPEAT + r
        each = row * REPEAT + r
        x = tl.load(q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + d, mask=d < D, other=0.0).to(tl.float32)
        s = tl.sum(y.to(tl.float32) * x[None], 1) * (scale * 1.4426950408889634)
        seen = ok
        if MASK > 0:
            at_mask = mask + b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h + key * mask_k
            value = tl.load(at_mask, mask=real, other=0)
            if MASK == 1:
                seen = seen & (value != 0)
            else:
                s += value.to(tl.float32) * 1.4426950408889634
        s = tl.where(seen, s, float("-inf"))
        at = out + each.to(tl.int64) * keys + key
        if LSE:
            level = tl.load(lse + each) * 1.4426950408889634
            level = tl.where(level == float("-inf"), 0.0, level)
            tl.store(at, tl.exp2(s - level), mask=real)
        else:
            tl.store(at, s, mask=real)
            top = tl.max(s, 0)
            total = tl.sum(tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)), 0)
            tl.store(stats + each * 2 * blocks + block, top)
            tl.store(stats + (each * 2 + 1) * blocks + block, total)
    release(OVERLAP)
    if not LSE:
        tl.debug_barrier()  # every thread has stored before one of them says so
        if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == blocks - 1:
            tl.store(arrived + row, 0)
            n = tl.arange(0, SPAN)
            p = tl.arange(0, BLOCK_P)
            for other in range(REPEAT):
                head = row * REPEAT + other
                # past the L1 cache, which is not coherent: other processors wrote this
                at_out = out + head.to(tl.int64) * keys + n
                logits = tl.load(at_out, mask=n < keys, other=float("-inf"), cache_modifier=".cg")
                at_top = stats + head * 2 * blocks + p
                tops = tl.load(at_top, mask=p < blocks, other=float("-inf"), cache_modifier=".cg")
                sums = tl.load(at_top + blocks, mask=p < blocks, other=0.0, cache_modifier=".cg")
                best = tl.max(tops, 0)
                best = tl.where(best == float("-inf"), 0.0, best)
                whole = tl.sum(sums * tl.exp2(tops - best), 0)
                factor = 1.0 / tl.where(whole == 0, 1.0, whole)
                tl.store(at_out, tl.exp2(logits - best) * factor, mask=n < keys)
                for first in range(SPAN, keys, SPAN):
                    here = first + n < keys
                    logits = tl.load(at_out + first, mask=here, other=float("-inf"), cache_modifier=".cg")
                    tl.store(at_out + first, tl.exp2(logits - best) * factor, mask=here)


@triton.jit
def _row_sums(
    q, k, stats, mask, last,
    q_b, q_h, q_n, k_b, k_h, k_n, mask_b, mask_h, mask_n, mask_k, last_b, heads, rows, keys, each, scale,
    REPEAT: tl.constexpr, PARTS: tl.constexpr, MASK: tl.constexpr, LAST: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of each row over one part of the keys; stats is [B, Hq, PARTS, R]."""
    part = tl.program_id(0)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    n = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    k += b.to(tl.int64) * k_b + (h // REPEAT).to(tl.int64) * k_h
    mask += b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h
    last += b.to(tl.int64) * last_b
    x = tl.load(q + n[:, None].to(tl.int64) * q_n + d[None], mask=(n < rows)[:, None] & (d < D)[None], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(part * each, tl.minimum((part + 1) * each, keys), BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        s = _logits(x, key, n, k, k_n, mask, mask_n, mask_k, last, keys, scale, D, BLOCK_D, MASK, LAST, PRECISION, rows)
        best = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = best
    level = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    tl.store(stats + (tl.program_id(1) * PARTS + part).to(tl.int64) * rows + n, level, mask=n < rows)


@triton.jit
def _masses(
    q, k, stats, out, mask, last,
    q_b, q_h, q_n, k_b, k_h, k_n, mask_b, mask_h, mask_n, mask_k, last_b, heads, rows, keys, scale, unit,
    REPEAT: tl.constexpr, PARTS: tl.constexpr, MASK: tl.constexpr, LAST: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities that one block of keys receives, summed over the rows; `unit` makes the stats base 2."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    k += b.to(tl.int64) * k_b + (h // REPEAT).to(tl.int64) * k_h
    mask += b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h
    last += b.to(tl.int64) * last_b
    stats += tl.program_id(1).to(tl.int64) * PARTS * rows
    mass = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, rows, BLOCK_M):
        n = at + tl.arange(0, BLOCK_M)
        x = tl.load(q + n[:, None].to(tl.int64) * q_n + d[None], mask=(n < rows)[:, None] & (d < D)[None], other=0.0)
        s = _logits(x, key, n, k, k_n, mask, mask_n, mask_k, last, keys, scale, D, BLOCK_D, MASK, LAST, PRECISION, rows)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for part in range(PARTS):
            top = tl.maximum(top, tl.load(stats + part * rows + n, mask=n < rows, other=float("-inf")) * unit)
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([BLOCK_M], tl.float32)
        for part in range(PARTS):
            level = tl.load(stats + part * rows + n, mask=n < rows, other=float("-inf")) * unit
            total += tl.exp2(level - safe)
        weight = tl.exp2(s - safe[:, None]) / tl.where(total == 0, 1.0, total)[:, None]
        mass += tl.sum(weight, 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * keys + key, mass, mask=key < keys)


def key_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    last: torch.Tensor | None,
    lse: torch.Tensor | None,
    **override: int,
) -> torch.Tensor:
    """See the public function; float32 [B, Hq, K], summed over rows. `override`: PARTS, BLOCK_N, SPAN, num_warps."""
    batch, heads, rows, dim = query.shape
    keys = key.shape[2]
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=query.device)
    if rows == 1:
        _score_row(query, key, scale, mask, last, lse, out, **override)
        return out
    block_n = override.pop("BLOCK_N", 64)
    parts = override.pop("PARTS", 0)
    if not parts:
        enough = ceil_div(4 * processors(query.device), batch * heads)
        parts = max(1, min(enough, ceil_div(keys, block_n), 32))
    each = ceil_div(ceil_div(keys, parts), block_n) * block_n
    seen = query if mask is None else mask.expand(batch, heads, rows, keys)
    limit = query if last is None else last.int().contiguous()
    strides = (*query.stride()[:3], *key.stride()[:3], *((0,) * 4 if mask is None else seen.stride()))
    strides += (0 if last is None else rows,)
    sizes: dict[str, Any] = {
        "REPEAT": heads // key.shape[1], "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "LAST": last is not None, "D": dim, "BLOCK_D": max(16, power_above(dim)),
        "BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": block_n,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    } | override  # fmt: skip
    if lse is None:
        stats = torch.empty(batch, heads, parts, rows, dtype=torch.float32, device=query.device)
        _row_sums[(parts, batch * heads, ceil_div(rows, sizes["BLOCK_M"]))](
            query, key, stats, seen, limit, *strides, heads, rows, keys, each, scale, PARTS=parts, **sizes
        )
    else:
        stats, parts = lse.float().contiguous(), 1
    unit = 1.0 if lse is None else 1.4426950408889634
    _masses[(ceil_div(keys, block_n), batch * heads)](
        query, key, stats, out, seen, limit, *strides, heads, rows, keys, scale, unit, PARTS=parts, **sizes
    )
    return out


def _score_row(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    last: torch.Tensor | None,
    lse: torch.Tensor | None,
    out: torch.Tensor,
    **override: int,
) -> None:
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    sizes = {"BLOCK_N": 128, "SPAN": 1024, "num_warps": 8} | override
    blocks = ceil_div(keys, sizes["BLOCK_N"])
    stats = arrived = out
    if lse is None:
        stats = torch.empty(batch * heads * 2 * blocks, dtype=torch.float32, device=query.device)
        arrived = counters(batch * kv_heads, query.device)
    seen = out if mask is None else mask.expand(batch, heads, 1, keys)
    mask_strides = (0, 0, 0) if mask is None else (seen.stride(0), seen.stride(1), seen.stride(3))
    launch(
        _one_row, (blocks, batch * kv_heads, 1),
        (query, key, out, stats, arrived, seen, out if last is None else last.int().contiguous(),
         out if lse is None else lse.float().contiguous()),
        (*query.stride()[:2], *key.stride()[:3], *mask_strides, kv_heads, keys, float(scale)),
        (heads // kv_heads, 0 if mask is None else 1 if mask.dtype == torch.bool else 2, last is not None,
         lse is not None, dim, max(16, power_above(dim)), sizes["BLOCK_N"], power_above(blocks),
         sizes["SPAN"]),
        num_warps=sizes["num_warps"],
    )  # fmt: skip
