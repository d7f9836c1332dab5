"""`grouped_attention` in Triton, forward.

One launch serves rows with a softmax and rows without. A program of the first kind takes one query block of one head
and, when few blocks would leave processors idle, one part of its key blocks; parts are merged by a second launch. With
partial results the parts are the key groups, each with its own list of blocks. Logits live in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import power_below, processors
from mmefficient.kernels.grouped_attention.layout import Layout
from mmefficient.kernels.grouped_attention.schedule import pairs, query_facts
from mmefficient.kernels.merge import merge

MIN_BLOCKS_PER_PART = 4


@triton.jit
def mapped(s, factors, map_f, map_g, bias_row, of, key, real, scale, MAP: tl.constexpr, BIAS: tl.constexpr):
    """Base-2 logits after scale, map by group and bias; `factors` points at this head's a, `map_f` before b and c."""
    if MAP:
        s = s * scale
        a = tl.load(factors + of * map_g).to(tl.float32)
        m = tl.load(factors + map_f + of * map_g).to(tl.float32)
        c = tl.load(factors + 2 * map_f + of * map_g).to(tl.float32)
        s = (a[None] * s + m[None] * tl.abs(s) + c[None]) * 1.4426950408889634
    else:
        s = s * (scale * 1.4426950408889634)
    if BIAS:
        s += (tl.load(bias_row + key, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634)[None]
    return s


@triton.jit
def _step(
    x, top, total, acc, facts, own, n, kb, k, v, k_n, v_n,
    rules, role, page, row, col, segment, groups_of, mask, base, mask_base, keys, factors, map_f, map_g, bias_row,
    scale, wanted,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, MAP: tl.constexpr,
    BIAS: tl.constexpr, PLACES: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One key block of the running softmax."""
    d = tl.arange(0, BLOCK_D)
    key = kb * BLOCK_N + tl.arange(0, BLOCK_N)
    real = key < keys
    at_k = k + key[None].to(tl.int64) * k_n + d[:, None]
    at_v = v + key[:, None].to(tl.int64) * v_n + d[None]
    if PARTIAL:
        y = tl.load(at_k, mask=(d < D)[:, None] & real[None], other=0.0)
        z = tl.load(at_v, mask=(d < D)[None] & real[:, None], other=0.0)
    elif D < BLOCK_D:
        y = tl.load(at_k, mask=(d < D)[:, None], other=0.0)
        z = tl.load(at_v, mask=(d < D)[None], other=0.0)
    else:
        y = tl.load(at_k)
        z = tl.load(at_v)
    raw = tl.dot(x, y, input_precision=PRECISION)
    of = key
    if MAP or (GROUPS > 1 and PARTIAL):
        of = tl.load(groups_of + key, mask=real, other=0)
    logit = mapped(raw, factors, map_f, map_g, bias_row, of, key, real, scale, MAP, BIAS)
    if PARTIAL:
        ok = pairs(
            facts, own, key, n, rules, role, page, row, col, segment, mask, base, mask_base, keys,
            PLACES, SEGMENTS, MASKED,
        )  # fmt: skip
        if GROUPS > 1:
            ok = ok & (of == wanted)[None]
        logit = tl.where(ok, logit, float("-inf"))
    new = tl.maximum(top, tl.max(logit, 1))
    safe = new
    if PARTIAL or BIAS or MAP:  # a row may have seen nothing but -inf
        safe = tl.where(new == float("-inf"), 0.0, new)
    weight = tl.exp2(logit - safe[:, None])
    fade = tl.exp2(top - safe)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(z.dtype), z, acc * fade[:, None], input_precision=PRECISION)
    return new, total, acc


@triton.jit
def _soft_rows(
    item, bh, b, bs, q, k, v, out, lse, part_out, part_lse, soft, blocks, counts, order, queries, rules,
    role, page, row, col, segment, group, mask, bias, factors, map_f, map_g, gain, q_n, k_n, v_n, o_g, o_n, gain_n,
    scale, batch, heads, rows, keys, padded, q_blocks, k_blocks, kinds, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PATTERNS: tl.constexpr,
    GROUPS: tl.constexpr, SPLIT: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr,
    LSE: tl.constexpr, CONTIGUOUS: tl.constexpr, PLACES: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block over one part of its keys."""
    base = b * keys
    lse_at = bh.to(tl.int64) * rows
    lse_g = batch * heads * rows
    d = tl.arange(0, BLOCK_D)
    g = item % (GROUPS * parts) // parts
    part = item % parts
    qb = tl.load(order + bs * q_blocks + item // (GROUPS * parts))
    slot = qb * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.load(soft + bs * padded + slot)
    used = n >= 0
    own = tl.load(queries + b * rows + n, mask=used, other=-1)
    x = tl.load(q + n[:, None].to(tl.int64) * q_n + d[None], mask=used[:, None] & (d < D)[None], other=0.0)
    facts = query_facts(own, rules, role, page, row, col, segment, base, PLACES, SEGMENTS)
    mask_base = b.to(tl.int64) * rows * keys
    lines = kinds * batch * PATTERNS * q_blocks
    line = (bs + (g + 1 if GROUPS > 1 else 0) * batch * PATTERNS) * q_blocks + qb
    partial = tl.load(counts + line)
    full = tl.load(counts + lines + line)
    some_blocks = blocks + line.to(tl.int64) * k_blocks
    all_blocks = some_blocks + lines * k_blocks
    first = part * (partial + full) // parts
    stop = (part + 1) * (partial + full) // parts
    start = tl.load(all_blocks, mask=full > 0, other=0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(first, tl.minimum(stop, full)):
        kb = start + i if CONTIGUOUS else tl.load(all_blocks + i)
        top, total, acc = _step(
            x, top, total, acc, facts, own, n, kb, k, v, k_n, v_n, rules, role, page, row, col, segment,
            group + base, mask, base, mask_base, keys, factors, map_f, map_g, bias, scale, g, D, BLOCK_D, BLOCK_N,
            GROUPS, MAP, BIAS, PLACES, SEGMENTS, MASKED, False, PRECISION,
        )  # fmt: skip
    for i in range(tl.maximum(first - full, 0), tl.maximum(stop - full, 0)):
        kb = tl.load(some_blocks + i)
        top, total, acc = _step(
            x, top, total, acc, facts, own, n, kb, k, v, k_n, v_n, rules, role, page, row, col, segment,
            group + base, mask, base, mask_base, keys, factors, map_f, map_g, bias, scale, g, D, BLOCK_D, BLOCK_N,
            GROUPS, MAP, BIAS, PLACES, SEGMENTS, MASKED, True, PRECISION,
        )  # fmt: skip
    factor = 1.0 / tl.where(total == 0, 1.0, total)
    if GAIN:
        factor *= tl.load(gain + n * gain_n, mask=used, other=0.0).to(tl.float32)
    acc = acc * factor[:, None]
    level = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    if SPLIT:
        spot = ((g * parts + part) * batch * heads + bh).to(tl.int64) * (q_blocks * BLOCK_M) + slot
        tl.store(part_lse + spot, level)
        tl.store(part_out + spot[:, None] * D + d[None], acc, mask=(d < D)[None])
    else:
        at = out + g.to(tl.int64) * o_g + n[:, None].to(tl.int64) * o_n + d[None]
        tl.store(at, acc.to(out.dtype.element_ty), mask=used[:, None] & (d < D)[None])
        if LSE:
            tl.store(lse + g * lse_g + lse_at + n, level * 0.6931471805599453, mask=used)


@triton.jit
def _rest_rows(
    item, bh, b, bs, q, k, v, out, lse, rest, source, group, bias, factors, map_f, map_g, gain,
    q_n, k_n, v_n, o_g, o_n, gain_n, scale, batch, heads, rows, keys, padded,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, MAP: tl.constexpr,
    BIAS: tl.constexpr, GAIN: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """A block of rows that see themselves alone, or nothing."""
    base = b * keys
    lse_at = bh.to(tl.int64) * rows
    lse_g = batch * heads * rows
    d = tl.arange(0, BLOCK_D)
    slot = item * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.load(rest + bs * padded + slot)
    used = n >= 0
    own = tl.load(source + bs * padded + slot)
    sees = own >= 0
    inside = sees[:, None] & (d < D)[None]
    value = tl.load(v + own[:, None].to(tl.int64) * v_n + d[None], mask=inside, other=0.0)
    if GAIN:
        value = value.to(tl.float32) * tl.load(gain + n * gain_n, mask=used, other=0.0).to(tl.float32)[:, None]
    level = tl.zeros([BLOCK_M], tl.float32)
    of = tl.load(group + base + own, mask=sees, other=-1)
    if LSE:
        x = tl.load(q + n[:, None].to(tl.int64) * q_n + d[None], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(k + own[:, None].to(tl.int64) * k_n + d[None], mask=inside, other=0.0).to(tl.float32)
        s = tl.sum(x * y, 1)[None]
        level = mapped(s, factors, map_f, map_g, bias, tl.maximum(of, 0), own, sees, scale, MAP, BIAS)
        level = tl.where(sees, tl.reshape(level, [BLOCK_M]) * 0.6931471805599453, float("-inf"))
    at = out + n[:, None].to(tl.int64) * o_n + d[None]
    for g in tl.static_range(GROUPS):
        mine = value
        if GROUPS > 1:
            mine = tl.where((of == g)[:, None], value, 0.0)
        tl.store(at + g * o_g, mine.to(out.dtype.element_ty), mask=used[:, None] & (d < D)[None])
        if LSE:
            here = level
            if GROUPS > 1:
                here = tl.where(of == g, level, float("-inf"))
            tl.store(lse + g * lse_g + lse_at + n, here, mask=used)


@triton.jit
def _forward(
    q, k, v, out, lse, part_out, part_lse,
    soft, rest, source, blocks, counts, order, queries, rules, head_pattern,
    role, page, row, col, segment, group, mask, bias, factors, gain,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_g, o_b, o_h, o_n, bias_b, bias_h, map_f, map_b,
    map_h, map_g, gain_b, gain_h, gain_n, scale,
    batch, heads, rows, keys, padded, q_blocks, k_blocks, soft_blocks, rest_blocks, kinds, parts,
    REPEAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PATTERNS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr,
    GAIN: tl.constexpr, LSE: tl.constexpr, CONTIGUOUS: tl.constexpr, PLACES: tl.constexpr, SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr, HEADS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    soft_items = soft_blocks * (GROUPS * parts)
    pid = tl.program_id(0)
    if HEADS_FIRST:
        item, bh = pid // (batch * heads), pid % (batch * heads)
    else:
        item, bh = pid % (soft_items + rest_blocks), pid // (soft_items + rest_blocks)
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
    gain += b.to(tl.int64) * gain_b + h.to(tl.int64) * gain_h
    bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    factors += b.to(tl.int64) * map_b + h * map_h
    if item < soft_items:
        _soft_rows(
            item, bh, b, bs, q, k, v, out, lse, part_out, part_lse, soft, blocks, counts, order,
            queries, rules, role, page, row, col, segment, group, mask, bias, factors, map_f, map_g, gain, q_n,
            k_n, v_n, o_g, o_n, gain_n, scale, batch, heads, rows, keys, padded, q_blocks, k_blocks,
            kinds, parts, D, BLOCK_D, BLOCK_M, BLOCK_N, PATTERNS, GROUPS, SPLIT, MAP, BIAS, GAIN, LSE,
            CONTIGUOUS, PLACES, SEGMENTS, MASKED, PRECISION,
        )  # fmt: skip
    else:
        _rest_rows(
            item - soft_items, bh, b, bs, q, k, v, out, lse, rest, source, group, bias, factors, map_f, map_g, gain,
            q_n, k_n, v_n, o_g, o_n, gain_n, scale, batch, heads, rows, keys, padded, D, BLOCK_D,
            BLOCK_M, GROUPS, MAP, BIAS, GAIN, LSE,
        )  # fmt: skip


def tuning(block_m: int, head_dim: int, dtype: torch.dtype, places: bool) -> dict[str, int]:
    """Warps and pipeline stages for blocks of `block_m` rows; `places`: the pattern compares places."""
    if dtype == torch.float32:
        return {"num_warps": 4, "num_stages": 1 if head_dim > 128 else 2}
    return {"num_warps": 8 if block_m * head_dim > 8192 else 4, "num_stages": 2 if head_dim > 128 or places else 3}


def parts_for(programs: int, longest: int, device: torch.device) -> int:
    """Into how many parts the keys of a query block are split: one, as soon as every processor has a program.

    Else a power of two: at least four of the `longest` key blocks to a part, eight programs to a processor, 16 parts.
    """
    if programs >= processors(device):
        return 1
    return power_below(min(longest // MIN_BLOCKS_PER_PART, 8 * processors(device) // max(programs, 1), 16))


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    scale: float,
    partials: bool,
    lse: bool = True,
    **override: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function. `override`: PARTS, HEADS_FIRST, num_warps, num_stages in place of the defaults."""
    made = layout.schedule
    if made is None:
        raise ValueError("this layout was made for the reference; make it with impl='auto' or 'triton'.")
    batch, heads, rows, dim = q.shape
    keys, groups = k.shape[2], layout.groups if partials else 1
    out = q.new_empty(groups, *q.shape, dtype=torch.float32) if partials else torch.empty_like(q)
    found = torch.empty(groups, batch if lse else 0, heads, rows, dtype=torch.float32, device=q.device)
    programs = made.soft_blocks * batch * heads * groups
    parts = override.pop("PARTS", 0) or parts_for(programs, made.longest, q.device)
    slots = made.soft.shape[-1]
    part_out = part_lse = found
    if parts > 1:
        part_out = torch.empty(groups * parts, batch, heads, slots, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(groups * parts, batch, heads, slots, dtype=torch.float32, device=q.device)
    spare = layout.role
    bias_strides: tuple[int, ...] = (0, 0)
    bias_row = spare
    if bias is not None:
        bias_row = bias.expand(batch, heads, keys)
        bias_row = bias_row if bias_row.stride(2) == 1 else bias_row.contiguous()
        bias_strides = bias_row.stride()[:2]
    map_strides: tuple[int, ...] = (0, 0, 0, 0)
    factors = spare
    if logit_map is not None:
        factors = logit_map.expand(3, batch, heads, -1)
        map_strides = factors.stride()
    gain_strides: tuple[int, ...] = (0, 0, 0)
    gain = spare
    if head_gain is not None:
        gain = head_gain.expand(batch, heads, rows)
        gain_strides = gain.stride()
    settings = tuning(made.block_m, dim, q.dtype, layout.page is not None) | {"HEADS_FIRST": 1} | override
    items = made.soft_blocks * groups * parts + made.rest_blocks
    _forward[(items * batch * heads,)](
        q, k, v, out, found, part_out, part_lse,
        made.soft, made.rest, made.source, made.blocks, made.counts, made.order, layout.queries, layout.rules,
        spare if layout.head_pattern is None else layout.head_pattern, *layout.pair_facts, bias_row, factors, gain,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.stride(0) if partials else 0, *out.stride()[-4:-1],
        *bias_strides, *map_strides, *gain_strides, scale, batch, heads, rows, keys, slots,
        made.order.shape[-1], made.state.shape[-1], made.soft_blocks, made.rest_blocks, made.state.shape[0], parts,
        REPEAT=heads // k.shape[1], D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_M=made.block_m, BLOCK_N=made.block_n, PATTERNS=len(layout.rules), GROUPS=groups, SPLIT=parts > 1,
        MAP=logit_map is not None, BIAS=bias is not None, GAIN=head_gain is not None, LSE=lse,
        CONTIGUOUS=made.contiguous, PLACES=layout.page is not None, SEGMENTS=layout.segment is not None,
        MASKED=layout.mask is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **settings,
    )  # fmt: skip
    if parts > 1:
        used = made.soft_blocks * made.block_m
        merge(part_out, part_lse, out, found if lse else None, parts, used, made.soft, layout.head_pattern)
    return out, found if partials else found[0]
