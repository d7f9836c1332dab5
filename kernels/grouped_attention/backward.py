"""Gradients of `grouped_attention` in Triton.

Two kernels recompute the weights from the saved log-sum-exp, as FlashAttention-2 does (arXiv 2307.08691, algorithm 2):
one walks the key blocks of a query block for the gradient of q, one the query blocks of a key block for those of k, v
and the bias. Both evaluate only blocks that hold pairs. Here a row that sees itself alone is a row like any other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div, power_above
from mmefficient.kernels.grouped_attention.blocks import pairs_by_block
from mmefficient.kernels.grouped_attention.layout import Layout
from mmefficient.kernels.grouped_attention.schedule import known_of, pairs, query_facts


@triton.jit
def _weights(
    a, b, c, d, shift, level, delta, ok, scale, BIAS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax weights a.b and gradients of the logits (through c.d) of one block, [rows, keys] or [keys, rows].

    The rest has that shape, or broadcasts to it; `shift`, the bias, and `level` to base 2.
    """
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION) * (scale * 1.4426950408889634) - level
    if BIAS:
        s += shift
    weight = tl.exp2(s)
    if PARTIAL:
        weight = tl.where(ok, weight, 0.0)
    return weight, weight * (tl.dot(c, tl.trans(d), input_precision=PRECISION) - delta)


@triton.jit
def _shift(bias, key, keys, BIAS: tl.constexpr):
    """Biases of a block of keys, to base 2."""
    found = key * 0.0
    if BIAS:
        found = tl.load(bias + key, mask=key < keys, other=0.0).to(tl.float32) * 1.4426950408889634
    return found


@triton.jit
def _rows(q, do, lse, n, q_n, do_n, used, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """q, the gradient of the output and the base-2 log-sum-exp of rows; +inf for a row that sees nothing: weights 0."""
    d = tl.arange(0, BLOCK_D)
    inside = used[:, None] & (d < D)[None]
    x = tl.load(q + n[:, None].to(tl.int64) * q_n + d[None], mask=inside, other=0.0)
    y = tl.load(do + n[:, None].to(tl.int64) * do_n + d[None], mask=inside, other=0.0)
    level = tl.load(lse + n, mask=used, other=float("-inf"))
    return x, y, tl.where(level == float("-inf"), float("inf"), level * 1.4426950408889634)


@triton.jit
def _of_rows(
    q, k, v, out, do, lse, dlse, delta, dq, blocks, counts, queries, rules, head_pattern,
    role, page, row, col, segment, group, mask, bias,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, do_b, do_h, do_n, dq_b, dq_h, dq_n, bias_b, bias_h,
    scale, batch, heads, rows, keys, q_blocks, k_blocks,
    REPEAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PATTERNS: tl.constexpr, BIAS: tl.constexpr, LSE: tl.constexpr, PLACES: tl.constexpr, SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta (the sum over D of out * d out, less d lse) and the gradient of q, for one query block."""
    qb = q_blocks - 1 - tl.program_id(0)
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    bs = b * PATTERNS
    if PATTERNS > 1:
        which = tl.load(head_pattern + h)
        bs += which
        rules += which * 6
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    k += b.to(tl.int64) * k_b + (h // REPEAT).to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + (h // REPEAT).to(tl.int64) * v_h
    out += b.to(tl.int64) * o_b + h.to(tl.int64) * o_h
    do += b.to(tl.int64) * do_b + h.to(tl.int64) * do_h
    dq += b.to(tl.int64) * dq_b + h.to(tl.int64) * dq_h
    bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    lse += bh.to(tl.int64) * rows
    delta += bh.to(tl.int64) * rows
    d = tl.arange(0, BLOCK_D)
    n = qb * BLOCK_M + tl.arange(0, BLOCK_M)
    used = n < rows
    inside = used[:, None] & (d < D)[None]
    x, y, level = _rows(q, do, lse, n, q_n, do_n, used, D, BLOCK_D)
    found = tl.load(out + n[:, None].to(tl.int64) * o_n + d[None], mask=inside, other=0.0).to(tl.float32)
    less = tl.sum(found * y.to(tl.float32), 1)
    if LSE:
        less -= tl.load(dlse + bh.to(tl.int64) * rows + n, mask=used, other=0.0)
    tl.store(delta + n, less, mask=used)
    own = tl.load(queries + b * rows + n, mask=used, other=-1)
    known = known_of(role, page, row, col, segment, group, mask, b, keys, rows)
    facts = query_facts(own, rules, known, PLACES, SEGMENTS)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lines = batch * PATTERNS * q_blocks
    line = bs * q_blocks + qb
    for kind in tl.static_range(2):  # blocks with some pairs, and with all
        for i in range(tl.load(counts + kind * lines + line)):
            kb = tl.load(blocks + (kind * lines + line).to(tl.int64) * k_blocks + i)
            key = kb * BLOCK_N + tl.arange(0, BLOCK_N)
            here = (key < keys)[:, None] & (d < D)[None]
            kk = tl.load(k + key[:, None].to(tl.int64) * k_n + d[None], mask=here, other=0.0)
            vv = tl.load(v + key[:, None].to(tl.int64) * v_n + d[None], mask=here, other=0.0)
            ok = used[:, None] & (key < keys)[None]
            if kind == 0:
                ok = pairs(facts, own, key, n, rules, known, keys, PLACES, SEGMENTS, MASKED)
            shift = _shift(bias, key, keys, BIAS)[None]
            change = _weights(
                x, kk, y, vv, shift, level[:, None], less[:, None], ok, scale, BIAS, kind == 0, PRECISION
            )[1]
            acc = tl.dot(change.to(kk.dtype), kk, acc, input_precision=PRECISION)
    at = dq + n[:, None].to(tl.int64) * dq_n + d[None]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _of_keys(
    q, k, v, do, lse, delta, dk, dv, dbias, blocks, counts, queries, rules, head_pattern,
    role, page, row, col, segment, group, mask, bias,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, bias_b, bias_h,
    scale, batch, heads, rows, keys, q_blocks, k_blocks,
    REPEAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PATTERNS: tl.constexpr, BIAS: tl.constexpr, DBIAS: tl.constexpr, PLACES: tl.constexpr, SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v and the bias, for one key block and all query heads that share it."""
    kb = tl.program_id(0)
    kv_heads = heads // REPEAT
    b, kv = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    d = tl.arange(0, BLOCK_D)
    key = kb * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (key < keys)[:, None] & (d < D)[None]
    k += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    kk = tl.load(k + key[:, None].to(tl.int64) * k_n + d[None], mask=inside, other=0.0)
    vv = tl.load(v + key[:, None].to(tl.int64) * v_n + d[None], mask=inside, other=0.0)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    known = known_of(role, page, row, col, segment, group, mask, b, keys, rows)
    lines = batch * PATTERNS * k_blocks
    for r in range(REPEAT):
        h = kv * REPEAT + r
        bs = b * PATTERNS
        rule = rules
        if PATTERNS > 1:
            which = tl.load(head_pattern + h)
            bs += which
            rule += which * 6
        at_q = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        at_do = do + b.to(tl.int64) * do_b + h.to(tl.int64) * do_h
        at_row = (b * heads + h).to(tl.int64) * rows
        at_bias = bias + b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
        shift = _shift(at_bias, key, keys, BIAS)[:, None]
        acc_b = tl.zeros([BLOCK_N], tl.float32)
        line = bs * k_blocks + kb
        for kind in tl.static_range(2):
            for i in range(tl.load(counts + kind * lines + line)):
                qb = tl.load(blocks + (kind * lines + line).to(tl.int64) * q_blocks + i)
                n = qb * BLOCK_M + tl.arange(0, BLOCK_M)
                used = n < rows
                x, y, level = _rows(at_q, at_do, lse + at_row, n, q_n, do_n, used, D, BLOCK_D)
                less = tl.load(delta + at_row + n, mask=used, other=0.0)
                ok = used[:, None] & (key < keys)[None]
                if kind == 0:
                    own = tl.load(queries + b * rows + n, mask=used, other=-1)
                    facts = query_facts(own, rule, known, PLACES, SEGMENTS)
                    ok = pairs(facts, own, key, n, rule, known, keys, PLACES, SEGMENTS, MASKED)
                weight, change = _weights(  # keys by rows: as they are, they are what the sums below multiply
                    kk, x, vv, y, shift, level[None], less[None], tl.trans(ok), scale, BIAS, kind == 0, PRECISION
                )
                acc_v = tl.dot(weight.to(y.dtype), y, acc_v, input_precision=PRECISION)
                acc_k = tl.dot(change.to(x.dtype), x, acc_k, input_precision=PRECISION)
                if DBIAS:
                    acc_b += tl.sum(change, 1)
        if DBIAS:
            tl.store(dbias + (b * heads + h).to(tl.int64) * keys + key, acc_b, mask=key < keys)
    at = dk + b.to(tl.int64) * dk_b + kv.to(tl.int64) * dk_h + key[:, None].to(tl.int64) * dk_n + d[None]
    tl.store(at, (acc_k * scale).to(dk.dtype.element_ty), mask=inside)
    at = dv + b.to(tl.int64) * dv_b + kv.to(tl.int64) * dv_h + key[:, None].to(tl.int64) * dv_n + d[None]
    tl.store(at, acc_v.to(dv.dtype.element_ty), mask=inside)


def blocks_for(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and keys of a block: two tiles of keys, two of rows and two sums have to fit a processor."""
    if dtype == torch.float32:
        return (16, 16) if head_dim > 128 else (32, 32)
    return (32, 32) if head_dim > 128 else (64, 64)


def grouped_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    layout: Layout,
    bias: torch.Tensor | None,
    scale: float,
    bias_grad: bool,
    blocks: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and bias (float32 [B, Hq, Nk], empty unless `bias_grad`) for a call without groups.

    Args:
        out, lse: what the call returned, lse float32 [B, Hq, Nq]; d_out, d_lse: the gradients of both.
        bias: [B, Hq, Nk].
        blocks: rows and keys of a block, in place of `blocks_for`.
    """
    batch, heads, rows, dim = q.shape
    keys, kv_heads = k.shape[2], k.shape[1]
    block_m, block_n = blocks or blocks_for(dim, q.dtype)
    by_rows, by_keys = pairs_by_block(layout, block_m, block_n)
    d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
    bias_row = layout.role
    if bias is not None:
        bias_row = bias if bias.stride(2) == 1 else bias.contiguous()
    bias_strides = (0, 0) if bias is None else bias_row.stride()[:2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    d_bias = torch.empty(batch, heads, keys if bias_grad else 0, dtype=torch.float32, device=q.device)
    facts = (
        layout.queries, layout.rules, layout.role if layout.head_pattern is None else layout.head_pattern,
        *layout.pair_facts, bias_row,
    )  # fmt: skip
    sizes = (scale, batch, heads, rows, keys, ceil_div(rows, block_m), ceil_div(keys, block_n))
    settings = {
        "REPEAT": heads // kv_heads, "D": dim, "BLOCK_D": max(16, power_above(dim)), "BLOCK_M": block_m,
        "BLOCK_N": block_n, "PATTERNS": len(layout.rules), "BIAS": bias is not None, "PLACES": layout.page is not None,
        "SEGMENTS": layout.segment is not None, "MASKED": layout.mask is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    _of_rows[(sizes[5], batch * heads)](
        q, k, v, out, d_out, lse, lse if d_lse is None else d_lse.contiguous(), delta, dq, *by_rows, *facts,
        *strides, *out.stride()[:3], *d_out.stride()[:3], *dq.stride()[:3], *bias_strides, *sizes,
        LSE=d_lse is not None, **settings,
    )  # fmt: skip
    _of_keys[(sizes[6], batch * kv_heads)](
        q, k, v, d_out, lse, delta, dk, dv, d_bias, *by_keys, *facts,
        *strides, *d_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *bias_strides, *sizes,
        DBIAS=bias_grad, **settings,
    )  # fmt: skip
    return dq, dk, dv, d_bias
