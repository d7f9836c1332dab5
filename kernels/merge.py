"""The stable merge of partial softmax results, which every split-K kernel ends with."""

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    part_out,
    part_lse,
    out,
    lse,
    rows_of,  # int32 [B, S, R]: row of the output, -1 = none
    head_pattern,
    rows,
    out_b,
    out_h,
    out_n,
    out_g,
    lse_rows,
    row_stride,
    heads,
    batch,
    patterns,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MAPPED: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Merge PARTS normalised outputs and base-2 log-sum-exps, [group, part, B, heads, rows(, D)]."""
    which = tl.program_id(1)
    group = which // (batch * heads)
    b = (which // heads) % batch
    h = which % heads
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    inside = r < rows
    if MAPPED:
        s = tl.load(head_pattern + h) if patterns > 1 else 0
        row = tl.load(rows_of + (b * patterns + s) * row_stride + r, mask=inside, other=-1)
    else:
        row = tl.where(inside, r, -1)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        at = ((group * PARTS + part) * batch + b) * heads + h
        top = tl.maximum(top, tl.load(part_lse + at.to(tl.int64) * rows + r, mask=inside, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        at = (((group * PARTS + part) * batch + b) * heads + h).to(tl.int64) * rows
        weight = tl.exp2(tl.load(part_lse + at + r, mask=inside, other=float("-inf")) - safe)
        values = tl.load(
            part_out + (at + r)[:, None] * D + d[None], mask=inside[:, None] & (d < D)[None], other=0.0
        )
        total += weight
        acc += values * weight[:, None]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    at = out + group.to(tl.int64) * out_g + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h
    keep = row >= 0
    tl.store(
        at + row[:, None].to(tl.int64) * out_n + d[None],
        acc.to(out.dtype.element_ty),
        mask=keep[:, None] & (d < D)[None],
    )
    if HAS_LSE:
        value = (safe + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + which.to(tl.int64) * lse_rows + row, value, mask=keep)
