"""The plan of blocks, computed on the device: one small kernel and one read of seven integers."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div, power_above
from mmefficient.kernels.grouped_attention.layout import Layout, Schedule
from mmefficient.kernels.launch import begin, launch


@triton.jit
def known_of(role, page, row, col, segment, group, mask, b, keys, rows):
    """Where the facts about the keys of row b of the batch begin, and its mask: a tuple that the others here take."""
    base = b.to(tl.int64) * keys
    return role + base, page + base, row + base, col + base, segment + base, group + base, mask + base * rows


@triton.jit
def query_facts(own, rules, known, PLACES: tl.constexpr, SEGMENTS: tl.constexpr):
    """Facts about the rows whose own keys are `own` (-1 = no row), a tuple that `pairs` takes."""
    which = tl.load(known[0] + own, mask=own >= 0, other=0)
    return ruled_facts(own, tl.load(rules + which), known, PLACES, SEGMENTS)


@triton.jit
def ruled_facts(own, rule, known, PLACES: tl.constexpr, SEGMENTS: tl.constexpr):
    """`query_facts` for rows whose rules have been looked up already."""
    _role, page, row, col, segment, _group, _mask = known
    real = own >= 0
    p, r, c, z = own, own, own, own
    if PLACES:
        p = tl.load(page + own, mask=real, other=-2)
        r = tl.load(row + own, mask=real, other=0)
        c = tl.load(col + own, mask=real, other=0)
    if SEGMENTS:
        z = tl.load(segment + own, mask=real, other=-2)
    return rule, p, r, c, z


@triton.jit
def pairs(
    facts, own, key, n, rules, known, keys, PLACES: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """bool [rows, keys]: which pairs of query rows n (-1 = none), whose own keys are `own`, and keys exist."""
    rule, p, r, c, z = facts
    role, page, row, col, segment, _group, mask = known
    real = key < keys
    which = tl.load(role + key, mask=real, other=0)
    bit = tl.where(which > 0, 1 << which, 0)
    sets = tl.where(key[None] <= own[:, None], (rule & 0xFF)[:, None], ((rule >> 8) & 0xFF)[:, None])
    near = key[None] == own[:, None]
    if PLACES:
        radius = tl.load(rules + 5)
        same = p[:, None] == tl.load(page + key, mask=real, other=-1)[None]
        high = tl.abs(r[:, None] - tl.load(row + key, mask=real, other=0)[None]) <= radius
        wide = tl.abs(c[:, None] - tl.load(col + key, mask=real, other=0)[None]) <= radius
        near = near | (same & high & wide)
    ok = ((sets & bit[None]) != 0) & (near | (((rule >> 16)[:, None] & bit[None]) == 0)) & (own >= 0)[:, None]
    if SEGMENTS:
        ok = ok & (z[:, None] == tl.load(segment + key, mask=real, other=-1)[None])
    if MASKED:
        at = mask + n[:, None].to(tl.int64) * keys + key[None]
        ok = ok & (tl.load(at, mask=(n >= 0)[:, None] & real[None], other=0) != 0)
    return ok


@triton.jit
def _sorted(role, queries, rules, b, start, keys, rows, SIMPLE: tl.constexpr, STEP: tl.constexpr):
    """Of `STEP` query rows from `start`: the row, its own key, whether it is soft or a rest row, and its source."""
    n = start + tl.arange(0, STEP)
    inside = n < rows
    own = tl.load(queries + b * rows + n, mask=inside, other=-1)
    which = tl.load(role + b * keys + own, mask=own >= 0, other=0)
    rule = tl.load(rules + which)
    solo = (own < 0) | (which == 0)
    if SIMPLE:
        solo = solo | ((rule >> 24) != 0)
    source = tl.where((which > 0) & ((rule & 0xFF) != 0), own, -1)
    return n, own, (inside & ~solo).to(tl.int32), (inside & solo).to(tl.int32), source


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _both(a, b):
    return a & b


@triton.jit
def _plan(
    role, page, row, col, segment, group, mask, queries, rules, lists, copied, blocks, counts, needs, state,
    keys, rows, padded, batch, patterns, q_blocks, k_blocks,
    KINDS: tl.constexpr, PLACES: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query block: its rows, and which key blocks they see in part or whole. The last one also lists rest rows."""
    begin(OVERLAP)
    qb = q_blocks - 1 - tl.program_id(0)
    bs = tl.program_id(1)
    kind = tl.program_id(2)
    b = bs // patterns
    rules += bs % patterns * 6
    soft = lists + bs * padded
    copied += bs.to(tl.int64) * keys
    n_soft = 0
    for start in range(0, rows, STEP):
        n, own, is_soft, is_rest, source = _sorted(role, queries, rules, b, start, keys, rows, not MASKED, STEP)
        n_soft += tl.sum(is_soft, 0)
    rank = padded - n_soft
    slot = qb * BLOCK_M + tl.arange(0, BLOCK_M)
    step = batch * patterns * padded
    tl.store(soft + slot, -1, mask=slot < rank)
    tl.store(soft + 5 * step + slot, -1, mask=slot < rank)
    tl.store(soft + 6 * step + slot, 0, mask=slot < rank)
    line = (kind * batch * patterns + bs) * q_blocks + qb
    lines = KINDS * batch * patterns * q_blocks
    n_partial = 0
    n_full = 0
    gaps = 0
    if ((qb + 1) * BLOCK_M > rank) | (qb == q_blocks - 1):
        for start in range(0, rows, STEP):
            n, own, is_soft, is_rest, source = _sorted(role, queries, rules, b, start, keys, rows, not MASKED, STEP)
            at = rank + tl.cumsum(is_soft, 0) - 1
            mine = (is_soft != 0) & (at >= qb * BLOCK_M) & (at < (qb + 1) * BLOCK_M)
            tl.store(soft + at, n, mask=mine)
            rank += tl.sum(is_soft, 0)
        tl.debug_barrier()
        n = tl.load(soft + slot)
        own = tl.load(queries + b * rows + n, mask=n >= 0, other=-1)
        known = known_of(role, page, row, col, segment, group, mask, b, keys, rows)
        facts = query_facts(own, rules, known, PLACES, SEGMENTS)
        rule = facts[0]
        if kind == 0:
            tl.store(soft + 5 * step + slot, own)
            tl.store(soft + 6 * step + slot, rule)
        state += line.to(tl.int64) * k_blocks
        low = tl.min(tl.where(n >= 0, own, keys), 0)
        high = tl.max(own, 0)
        any_before = tl.reduce(tl.where(n >= 0, rule & 0xFF, 0), 0, _either)
        all_before = tl.reduce(tl.where(n >= 0, rule & 0xFF, 0xFF), 0, _both)
        any_behind = tl.reduce(tl.where(n >= 0, rule >> 8 & 0xFF, 0), 0, _either)
        all_behind = tl.reduce(tl.where(n >= 0, rule >> 8 & 0xFF, 0xFF), 0, _both)
        near = tl.reduce(tl.where(n >= 0, rule >> 16 & 0xFF, 0), 0, _either)
        first = k_blocks
        last = -1
        for start in range(0, k_blocks, WIDE):  # a block before all rows, or behind, is known by the roles it holds
            kb = start + tl.arange(0, WIDE)
            key = kb[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None]
            real = key < keys
            bit = 1 << tl.load(role + b.to(tl.int64) * keys + key, mask=real, other=0)
            present = tl.reduce(bit, 1, _either)
            mine = real
            if KINDS > 1:
                of = tl.load(group + b.to(tl.int64) * keys + key, mask=real, other=-1)
                mine = tl.where(kind > 0, of, -1) == kind - 1
            before = kb * BLOCK_N + BLOCK_N - 1 <= low
            sure = (before | (kb * BLOCK_N > high)) & ((near & present) == 0)
            if SEGMENTS or MASKED:
                sure = kb < 0
            seen = tl.where(before, any_before, any_behind) & tl.reduce(tl.where(mine, bit, 0), 1, _either)
            whole = (present & ~tl.where(before, all_before, all_behind)) == 0
            whole_group = whole & (tl.min(mine.to(tl.int32), 1) != 0)
            found = tl.where(seen != 0, tl.where(whole_group, 2, tl.where(whole, 3, 1)), 0)
            tl.store(state + kb, found, mask=kb < k_blocks)
            unsure = ~sure & (kb < k_blocks)
            first = tl.minimum(first, tl.min(tl.where(unsure, kb, k_blocks), 0))
            last = tl.maximum(last, tl.max(tl.where(unsure, kb, -1), 0))
        tl.debug_barrier()
        for start in range(first, last + 1, CHUNK):  # any other pair by pair
            kb = start + tl.arange(0, CHUNK)
            key = start * BLOCK_N + tl.arange(0, CHUNK * BLOCK_N)
            ok = pairs(facts, own, key, n, rules, known, keys, PLACES, SEGMENTS, MASKED)
            whole = tl.min(tl.reshape(tl.min((ok | (n < 0)[:, None]).to(tl.int32), 0), [CHUNK, BLOCK_N]), 1)
            if KINDS > 1:
                of = tl.load(group + b.to(tl.int64) * keys + key, mask=key < keys, other=-1)
                ok = ok & (tl.where(kind > 0, of, -1) == kind - 1)[None]
            some = tl.max(tl.reshape(tl.max(ok.to(tl.int32), 0), [CHUNK, BLOCK_N]), 1)
            every = tl.min(tl.reshape(tl.min((ok | (n < 0)[:, None]).to(tl.int32), 0), [CHUNK, BLOCK_N]), 1)
            found = tl.where(some > 0, tl.where(every > 0, 2, tl.where(whole > 0, 3, 1)), 0)
            tl.store(state + kb, found, mask=kb < k_blocks)
        tl.debug_barrier()
        first = k_blocks
        last = -1
        for start in range(0, k_blocks, WIDE):
            kb = start + tl.arange(0, WIDE)
            found = tl.load(state + kb, mask=kb < k_blocks, other=0)
            partial = (found % 2).to(tl.int32)
            full = (found == 2).to(tl.int32)
            entry = kb + ((found == 3).to(tl.int32) << 24)
            if KINDS > 1:
                key = kb[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None]
                of = tl.load(group + b.to(tl.int64) * keys + key, mask=key < keys, other=-1)
                most = tl.max(of, 1)
                entry += tl.where(tl.min(tl.where(key < keys, of, most[:, None]), 1) == most, most + 1, 0) << 26
            to = blocks + line.to(tl.int64) * k_blocks + tl.cumsum(partial, 0) - 1 + n_partial
            tl.store(to, entry, mask=partial != 0)
            to = blocks + (lines + line).to(tl.int64) * k_blocks + tl.cumsum(full, 0) - 1 + n_full
            tl.store(to, entry, mask=full != 0)
            n_partial += tl.sum(partial, 0)
            n_full += tl.sum(full, 0)
            first = tl.minimum(first, tl.min(tl.where(full != 0, kb, k_blocks), 0))
            last = tl.maximum(last, tl.max(tl.where(full != 0, kb, -1), 0))
        gaps = ((n_full > 0) & (last - first + 1 != n_full)).to(tl.int32)
    tl.store(counts + line, n_partial)
    tl.store(counts + lines + line, n_full)
    tl.atomic_max(needs + 3, n_partial)
    tl.atomic_max(needs + 4, n_full)
    tl.atomic_max(needs + 5, gaps)
    if kind == 0:
        tl.atomic_add(needs + 6, n_partial + n_full)
    if (qb == q_blocks - 1) & (kind == 0):
        for start in range(0, keys, STEP):
            key = start + tl.arange(0, STEP)
            tl.store(copied + key, -1, mask=key < keys)
        tl.debug_barrier()
        n_rest = 0
        n_left = 0
        for start in range(0, rows, STEP):
            n, own, is_soft, is_rest, source = _sorted(role, queries, rules, b, start, keys, rows, not MASKED, STEP)
            to = soft + step + n_rest + tl.cumsum(is_rest, 0) - 1
            tl.store(to, n, mask=is_rest != 0)
            tl.store(to + step, source, mask=is_rest != 0)
            n_rest += tl.sum(is_rest, 0)
            real = (is_rest != 0) & (source >= 0)
            before = tl.load(queries + b * rows + n - 1, mask=real & (n > 0), other=-1)
            seen = tl.load(state + source // BLOCK_N, mask=real, other=0) != 0
            taken = real & seen & (before != own)
            tl.store(copied + source, n, mask=taken)
            is_left = ((is_rest != 0) & ~taken).to(tl.int32)
            to = soft + 3 * step + n_left + tl.cumsum(is_left, 0) - 1
            tl.store(to, n, mask=is_left != 0)
            tl.store(to + step, source, mask=is_left != 0)
            n_left += tl.sum(is_left, 0)
        for start in range(0, padded, STEP):
            at = start + tl.arange(0, STEP)
            tl.store(soft + step + at, -1, mask=(at >= n_rest) & (at < padded))
            tl.store(soft + 2 * step + at, -1, mask=(at >= n_rest) & (at < padded))
            tl.store(soft + 3 * step + at, -1, mask=(at >= n_left) & (at < padded))
            tl.store(soft + 4 * step + at, -1, mask=(at >= n_left) & (at < padded))
        tl.atomic_max(needs, n_soft)
        tl.atomic_max(needs + 1, n_rest)
        tl.atomic_max(needs + 2, n_left)


def schedule(layout: Layout, block_m: int, block_n: int, exact: bool) -> Layout:
    """The layout with its `Schedule` for blocks of `block_m` rows by `block_n` keys; `exact` as for `make_layout`."""
    batch, rows = layout.queries.shape
    keys, patterns, device = layout.role.shape[1], len(layout.rules), layout.role.device
    q_blocks, k_blocks = ceil_div(rows, block_m), ceil_div(keys, block_n)
    kinds = 1 if layout.groups == 1 else 1 + layout.groups
    lists = torch.empty(7, batch, patterns, q_blocks * block_m, dtype=torch.int32, device=device)
    copied = torch.empty(batch, patterns, keys, dtype=torch.int32, device=device)
    blocks = torch.empty(2, kinds, batch, patterns, q_blocks, k_blocks, dtype=torch.int32, device=device)
    counts = torch.empty(2, kinds, batch, patterns, q_blocks, dtype=torch.int32, device=device)
    needs = torch.zeros(7, dtype=torch.int32, device=device)
    state = torch.empty(kinds, batch, patterns, q_blocks, k_blocks, dtype=torch.int8, device=device)
    launch(
        _plan,
        (q_blocks, batch * patterns, kinds),
        (*layout.pair_facts, layout.queries, layout.rules, lists, copied, blocks, counts, needs, state),
        (keys, rows, q_blocks * block_m, batch, patterns, q_blocks, k_blocks),
        (
            kinds, layout.page is not None, layout.segment is not None, layout.mask is not None, block_m, block_n,
            64, 2, min(4096, power_above(max(rows, keys))),
        ),
        num_warps=8,
    )  # fmt: skip
    if exact:
        n_soft, n_rest, n_left, partial, full, gaps, work = needs.tolist()
    else:
        n_soft = n_rest = n_left = rows
        partial, full, gaps, work = 0, k_blocks, 1, batch * patterns * q_blocks * k_blocks
    made = Schedule(
        block_m=block_m,
        block_n=block_n,
        lists=lists,
        copied=copied,
        blocks=blocks,
        counts=counts,
        soft_blocks=ceil_div(n_soft, block_m),
        rest_blocks=ceil_div(n_rest, block_m),
        left_blocks=ceil_div(n_left, block_m),
        longest=partial + full,
        work=work,
        contiguous=not gaps,
    )
    return replace(layout, schedule=made)
