"""`grouped_attention` in Triton, forward.

One launch serves rows with a softmax and rows without. A program of the first kind takes one query block of one head
and, when few blocks would leave processors idle, one part of its key blocks; the part that finishes last merges them.
With partial results every key group has a list of blocks, a softmax and an output of its own. The last query block
reads the values of most rest rows anyway, so it can copy them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmefficient.kernels.grouped_attention.schedule import known_of, ruled_facts
from mmefficient.kernels.grouped_attention.softmax import biases, in_units, mapped, merged, step, unit


@triton.jit
def _entry(all_blocks, some_blocks, start, i, full, real, CONTIGUOUS: tl.constexpr):
    """Entry i of the lists of a query block: those of full key blocks, which may follow each other, come first."""
    if CONTIGUOUS:  # a load that is masked off costs no wait
        return tl.where(i < full, start + i, tl.load(some_blocks + (i - full), mask=(i >= full) & real, other=0))
    else:
        return tl.load(tl.where(i < full, all_blocks + i, some_blocks + (i - full)), mask=real, other=0)


@triton.jit
def _store(
    acc, level, g, bh, n, out, lse, o_g, o_n, batch, heads, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Store what group g gives to rows n: output, and log-sum-exp to the base of two."""
    d = tl.arange(0, BLOCK_D)
    at = out + g.to(tl.int64) * o_g + n[:, None].to(tl.int64) * o_n + d[None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(n >= 0)[:, None] & (d < D)[None])
    if LSE:
        to = lse + (g * batch * heads + bh).to(tl.int64) * rows + n
        tl.store(to, level * 0.6931471805599453, mask=n >= 0)


@triton.jit
def _soft_rows(
    item, bh, b, bs, q, k, v, out, lse, scratch, arrived, lists, copied, blocks, counts, rules, known, shaping,
    gain, q_n, k_n, v_n, o_g, o_n, gain_n, scale, batch, heads, rows, keys, padded, q_blocks, k_blocks, soft_blocks,
    kinds,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PATTERNS: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr,
    GAIN: tl.constexpr, LSE: tl.constexpr, COPIES: tl.constexpr, CONTIGUOUS: tl.constexpr, PLACES: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block over one part of its keys, of one group if there are several."""
    d = tl.arange(0, BLOCK_D)
    part = item % PARTS
    g = item // PARTS % GROUPS
    block = item // (PARTS * GROUPS)
    qb = q_blocks - 1 - block
    slots = lists + bs * padded + qb * BLOCK_M
    rows_of = batch * PATTERNS * padded
    n = tl.load(slots + tl.arange(0, BLOCK_M))
    own = tl.load(slots + 5 * rows_of + tl.arange(0, BLOCK_M))
    rule = tl.load(slots + 6 * rows_of + tl.arange(0, BLOCK_M))
    lines = kinds * batch * PATTERNS * q_blocks
    line = (bs + (g + 1 if GROUPS > 1 else 0) * batch * PATTERNS) * q_blocks + qb
    partial = tl.load(counts + line)
    full = tl.load(counts + lines + line)
    some_blocks = blocks + line.to(tl.int64) * k_blocks
    all_blocks = some_blocks + lines * k_blocks
    start = tl.load(all_blocks) & 0xFFFFFF
    used = n >= 0
    x = tl.load(q + n[:, None].to(tl.int64) * q_n + d[None], mask=used[:, None] & (d < D)[None], other=0.0)
    facts = ruled_facts(own, rule, known, PLACES, SEGMENTS)
    parts = 1
    if PARTS > 1:  # short lists in fewer parts
        parts = tl.minimum(PARTS, tl.maximum(partial + full, 2) // 2)
    first = part * (partial + full) // parts
    stop = (part + 1) * (partial + full) // parts
    if part >= parts:
        stop = first
    copies = tl.where(block == 0, keys, 0)  # the last query block alone
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if GAIN:
        factor = tl.load(gain + n * gain_n, mask=used, other=0.0).to(tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ahead = _entry(all_blocks, some_blocks, start, first, full, first < stop, CONTIGUOUS)
    coming = biases(shaping, ahead, keys, scale, BLOCK_N, MAP, BIAS, PADDED)
    for i in range(first, stop):
        entry, shift = ahead, coming  # the next ones are fetched a block early, so that nothing waits for them
        ahead = _entry(all_blocks, some_blocks, start, i + 1, full, i + 1 < stop, CONTIGUOUS)
        coming = biases(shaping, ahead, keys, scale, BLOCK_N, MAP, BIAS, PADDED)
        top, total, acc = step(
            x, top, total, acc, facts, own, n, entry, shift, i >= full, k, v, k_n, v_n, rules, known, keys, shaping,
            scale, g, copied, copies, out, o_n, D, BLOCK_D, BLOCK_M, BLOCK_N, GROUPS, MAP, BIAS, COPIES, PLACES,
            SEGMENTS, MASKED, PRECISION,
        )  # fmt: skip
    level = tl.where(total == 0, float("-inf"), top * unit(scale, MAP) + tl.log2(total))
    acc = acc * (factor / tl.where(total == 0, 1.0, total))[:, None]
    whole = part < parts
    if PARTS > 1:
        split = whole & (parts > 1)
        if split:
            task = ((block * GROUPS + g) * batch * heads + bh).to(tl.int64)
            tasks = (task * 0 + soft_blocks) * GROUPS * batch * heads
            whole, acc, level = merged(
                acc, level, scratch, arrived, task, part, parts, tasks, D, BLOCK_D, BLOCK_M, PARTS
            )  # fmt: skip
    if whole:
        _store(acc, level, g, bh, n, out, lse, o_g, o_n, batch, heads, rows, D, BLOCK_D, LSE)


@triton.jit
def _rest_rows(
    slots, sources, bh, q, k, v, out, lse, known, shaping, gain, q_n, k_n, v_n, o_g, o_n, gain_n, scale,
    batch, heads, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, MAP: tl.constexpr,
    BIAS: tl.constexpr, GAIN: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """A block of rows that see themselves alone, or nothing."""
    d = tl.arange(0, BLOCK_D)
    n = tl.load(slots + tl.arange(0, BLOCK_M))
    own = tl.load(sources + tl.arange(0, BLOCK_M))
    used = n >= 0
    sees = own >= 0
    inside = sees[:, None] & (d < D)[None]
    value = tl.load(v + own[:, None].to(tl.int64) * v_n + d[None], mask=inside, other=0.0)
    if GAIN:
        value = value.to(tl.float32) * tl.load(gain + n * gain_n, mask=used, other=0.0).to(tl.float32)[:, None]
    level = tl.zeros([BLOCK_M], tl.float32)
    of = tl.load(known[5] + own, mask=sees, other=-1)
    if LSE:
        x = tl.load(q + n[:, None].to(tl.int64) * q_n + d[None], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(k + own[:, None].to(tl.int64) * k_n + d[None], mask=inside, other=0.0).to(tl.float32)
        s = mapped(tl.sum(x * y, 1), shaping, tl.maximum(of, 0), scale, MAP)
        if BIAS:
            s += in_units(tl.load(shaping[0] + own, mask=sees, other=0.0), scale, MAP)
        level = tl.where(sees, s * unit(scale, MAP) * 0.6931471805599453, float("-inf"))
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
            tl.store(lse + (g * batch * heads + bh).to(tl.int64) * rows + n, here, mask=used)


@triton.jit
def _forward(
    q, k, v, out, lse, scratch, arrived, bias, factors, gain,
    lists, copied, blocks, counts, rules, head_pattern, role, page, row, col, segment, group, mask,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_g, o_b, o_h, o_n, bias_b, bias_h, map_f, map_b,
    map_h, map_g, gain_b, gain_h, gain_n, scale,
    batch, heads, rows, keys, padded, q_blocks, k_blocks, soft_blocks, kinds,
    REPEAT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PATTERNS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, GAIN: tl.constexpr, LSE: tl.constexpr, COPIES: tl.constexpr, CONTIGUOUS: tl.constexpr,
    PLACES: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)  # heads vary fastest: programs running together read the same lists
    item, bh = pid // (batch * heads), pid % (batch * heads)
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
    known = known_of(role, page, row, col, segment, group, mask, b, keys, rows)
    shaping = (bias, factors, map_f, map_g)
    soft_items = soft_blocks * (PARTS * GROUPS)
    if item < soft_items:
        _soft_rows(
            item, bh, b, bs, q, k, v, out, lse, scratch, arrived, lists, copied + bs.to(tl.int64) * keys,
            blocks, counts, rules, known, shaping, gain, q_n, k_n, v_n, o_g, o_n, gain_n, scale, batch, heads,
            rows, keys, padded, q_blocks, k_blocks, soft_blocks, kinds, D, BLOCK_D, BLOCK_M, BLOCK_N, PATTERNS,
            GROUPS, PARTS, MAP, BIAS, PADDED, GAIN, LSE, COPIES, CONTIGUOUS, PLACES, SEGMENTS, MASKED, PRECISION,
        )  # fmt: skip
    else:
        line = batch * PATTERNS * padded
        slots = lists + (3 if COPIES else 1) * line + bs * padded + (item - soft_items) * BLOCK_M
        _rest_rows(
            slots, slots + line, bh, q, k, v, out, lse, known, shaping, gain, q_n, k_n, v_n, o_g, o_n, gain_n, scale,
            batch, heads, rows, D, BLOCK_D, BLOCK_M, GROUPS, MAP, BIAS, GAIN, LSE,
        )  # fmt: skip
