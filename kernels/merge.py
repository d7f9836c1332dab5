"""The stable merge of partial softmax results, which every split-K kernel ends with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _merge(
    part_out, part_lse, out, lse, rows_of, head_pattern, rows, out_g, out_b, out_h, out_n,
    lse_rows, heads, batch, patterns,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MAPPED: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    group, b, h = which // (batch * heads), which // heads % batch, which % heads
    r = tl.program_id(0)
    row = r
    if MAPPED:
        s = 0
        if patterns > 1:
            s = tl.load(head_pattern + h)
        row = tl.load(rows_of + (b * patterns + s) * rows + r)
    if row >= 0:
        p = tl.arange(0, BLOCK_P)
        d = tl.arange(0, BLOCK_D)
        at = (((group * PARTS + p) * batch + b) * heads + h).to(tl.int64) * rows + r
        level = tl.load(part_lse + at, mask=p < PARTS, other=float("-inf"))
        parts = tl.load(part_out + at[:, None] * D + d[None], mask=(p < PARTS)[:, None] & (d < D)[None], other=0.0)
        top = tl.max(level, 0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(level - safe)
        total = tl.sum(weight, 0)
        value = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
        to = out + group.to(tl.int64) * out_g + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h
        tl.store(to + row.to(tl.int64) * out_n + d, value.to(out.dtype.element_ty), mask=d < D)
        if LSE:
            tl.store(lse + which.to(tl.int64) * lse_rows + row, (safe + tl.log2(total)) * 0.6931471805599453)


def merge(
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    parts: int,
    used: int,
    rows_of: torch.Tensor | None = None,
    head_pattern: torch.Tensor | None = None,
) -> None:
    """Merge `parts` normalised outputs into `out`, and their log-sum-exps into `lse`.

    Args:
        part_out, part_lse: float32 [groups * parts, B, Hq, R, D] and, in base 2, [groups * parts, B, Hq, R].
        out: [groups, B, Hq, N, D], or [B, Hq, N, D] with one group; lse: float32 [groups, B, Hq, N], natural.
        used: rows of R that count.
        rows_of: int32 [B, patterns, R], the row of `out` each belongs to, -1 = none; None = the same row.
        head_pattern: int32 [Hq], as in a layout; None with one pattern.
    """
    groups = part_out.shape[0] // parts
    batch, heads, rows, dim = part_out.shape[1:]
    block_p, block_d = triton.next_power_of_2(parts), max(16, triton.next_power_of_2(dim))
    _merge[(used, groups * batch * heads)](
        part_out, part_lse, out, part_lse if lse is None else lse, part_lse if rows_of is None else rows_of,
        part_lse if head_pattern is None else head_pattern, rows, out.stride(0) if out.ndim == 5 else 0,
        *out.stride()[-4:-1], 0 if lse is None else lse.shape[-1], heads, batch,
        1 if rows_of is None else rows_of.shape[1], PARTS=parts, BLOCK_P=block_p, D=dim, BLOCK_D=block_d,
        MAPPED=rows_of is not None, LSE=lse is not None, num_warps=min(4, max(1, block_p * block_d // 1024)),
    )  # fmt: skip
