"""The plan of blocks, computed on the device: three small kernels and one read of five integers."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from mmefficient.kernels.grouped_attention.layout import Layout, Schedule


@triton.jit
def query_facts(own, rules, role, page, row, col, segment, base, PLACES: tl.constexpr, SEGMENTS: tl.constexpr):
    """Facts about the rows whose own keys are `own` (-1 = no row), a tuple that `pairs` takes."""
    real = own >= 0
    at = base + own
    which = tl.load(role + at, mask=real, other=0)
    rule = tl.load(rules + which)
    p, r, c, z = own, own, own, own
    if PLACES:
        p = tl.load(page + at, mask=real, other=-2)
        r = tl.load(row + at, mask=real, other=0)
        c = tl.load(col + at, mask=real, other=0)
    if SEGMENTS:
        z = tl.load(segment + at, mask=real, other=-2)
    return rule, p, r, c, z


@triton.jit
def pairs(
    facts,
    own,
    key,
    query_row,
    rules,
    role,
    page,
    row,
    col,
    segment,
    mask,
    base,
    mask_base,
    keys,
    PLACES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """bool [rows, keys]: which pairs exist."""
    rule, p, r, c, z = facts
    real = key < keys
    which = tl.load(role + base + key, mask=real, other=0)
    bit = tl.where(which > 0, 1 << which, 0)
    sets = tl.where(key[None] <= own[:, None], (rule & 0xFF)[:, None], ((rule >> 8) & 0xFF)[:, None])
    near = key[None] == own[:, None]
    if PLACES:
        radius = tl.load(rules + 5)
        same = p[:, None] == tl.load(page + base + key, mask=real, other=-1)[None]
        high = tl.abs(r[:, None] - tl.load(row + base + key, mask=real, other=0)[None]) <= radius
        wide = tl.abs(c[:, None] - tl.load(col + base + key, mask=real, other=0)[None]) <= radius
        near = near | (same & high & wide)
    ok = ((sets & bit[None]) != 0) & (near | (((rule >> 16)[:, None] & bit[None]) == 0)) & (own >= 0)[:, None]
    if SEGMENTS:
        ok = ok & (z[:, None] == tl.load(segment + base + key, mask=real, other=-1)[None])
    if MASKED:
        at = mask + mask_base + query_row[:, None].to(tl.int64) * keys + key[None]
        ok = ok & (tl.load(at, mask=(query_row >= 0)[:, None] & real[None], other=0) != 0)
    return ok


@triton.jit
def _sort_rows(
    role, queries, rules, soft, rest, source, needs, keys, rows, padded, patterns,
    SIMPLE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Split the query rows of one row of the batch into those that need a softmax and the others, order kept."""
    b = tl.program_id(0)
    s = tl.program_id(1)
    out = (b * patterns + s) * padded
    n_soft = 0
    n_rest = 0
    for start in range(0, rows, STEP):
        n = start + tl.arange(0, STEP)
        inside = n < rows
        own = tl.load(queries + b * rows + n, mask=inside, other=-1)
        which = tl.load(role + b * keys + own, mask=own >= 0, other=0)
        rule = tl.load(rules + s * 6 + which)
        solo = (own < 0) | (which == 0)
        if SIMPLE:
            solo = solo | ((rule >> 24) != 0)
        is_soft = (inside & ~solo).to(tl.int32)
        is_rest = (inside & solo).to(tl.int32)
        tl.store(soft + out + n_soft + tl.cumsum(is_soft, 0) - 1, n, mask=is_soft != 0)
        spot = out + n_rest + tl.cumsum(is_rest, 0) - 1
        tl.store(rest + spot, n, mask=is_rest != 0)
        tl.store(source + spot, tl.where((which > 0) & ((rule & 0xFF) != 0), own, -1), mask=is_rest != 0)
        n_soft += tl.sum(is_soft, 0)
        n_rest += tl.sum(is_rest, 0)
    tl.atomic_max(needs, n_soft)
    tl.atomic_max(needs + 1, n_rest)


@triton.jit
def _classify(
    soft,
    state,
    queries,
    rules,
    role,
    page,
    row,
    col,
    segment,
    group,
    mask,
    keys,
    rows,
    padded,
    batch,
    patterns,
    q_blocks,
    k_blocks,
    GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """State of one (query block, key block): no pair exists, some, or all; over all groups and for each."""
    kb = tl.program_id(0)
    qb = tl.program_id(1)
    bs = tl.program_id(2)
    b = bs // patterns
    s = bs % patterns
    n = tl.load(soft + bs * padded + qb * BLOCK_M + tl.arange(0, BLOCK_M))
    at = state + (bs * q_blocks + qb) * k_blocks + kb
    step = batch * patterns * q_blocks * k_blocks
    if tl.max(n, 0) < 0:
        for g in tl.static_range(GROUPS):
            tl.store(at + g * step, 0)
    else:
        own = tl.load(queries + b * rows + n, mask=n >= 0, other=-1)
        key = kb * BLOCK_N + tl.arange(0, BLOCK_N)
        facts = query_facts(own, rules + s * 6, role, page, row, col, segment, b * keys, PLACES, SEGMENTS)
        mask_base = b.to(tl.int64) * rows * keys
        ok = pairs(
            facts, own, key, n, rules + s * 6, role, page, row, col, segment, mask, b * keys, mask_base, keys,
            PLACES, SEGMENTS, MASKED,
        )  # fmt: skip
        some = tl.max(tl.max(ok.to(tl.int32), 1), 0)
        every = tl.min(tl.min((ok | (n < 0)[:, None]).to(tl.int32), 1), 0)
        tl.store(at, some + every)
        if GROUPS > 1:
            of = tl.load(group + b * keys + key, mask=key < keys, other=-1)
            for g in tl.static_range(1, GROUPS):
                inside = ok & (of == g - 1)[None]
                some_g = tl.max(tl.max(inside.to(tl.int32), 1), 0)
                every_g = tl.min(tl.min((inside | (n < 0)[:, None]).to(tl.int32), 1), 0)
                tl.store(at + g * step, some_g + every_g)


@triton.jit
def _list_blocks(
    state, blocks, counts, needs, across, outer, inner, stride_out, stride_in, half, half_counts, STEP: tl.constexpr
):
    """Collect the partial and the full blocks along one line of `state`."""
    line = tl.program_id(0)
    at = state + (line // outer) * (outer * inner) + (line % outer) * stride_out
    for kind in tl.static_range(2):
        found = 0
        last = 0
        first = across
        for start in range(0, inner, STEP):
            i = start + tl.arange(0, STEP)
            hit = (tl.load(at + i * stride_in, mask=i < inner, other=0) == kind + 1).to(tl.int32)
            spot = blocks + kind * half + line.to(tl.int64) * inner + found + tl.cumsum(hit, 0) - 1
            tl.store(spot, i, mask=hit != 0)
            found += tl.sum(hit, 0)
            last = tl.maximum(last, tl.max(tl.where(hit != 0, i, -1), 0))
            first = tl.minimum(first, tl.min(tl.where(hit != 0, i, across), 0))
        tl.store(counts + kind * half_counts + line, found)
        tl.atomic_max(needs + 2 + kind, found)
        if kind == 1:
            tl.atomic_max(needs + 4, ((found > 0) & (last - first + 1 != found)).to(tl.int32))


def list_blocks(
    state: torch.Tensor, needs: torch.Tensor, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of the partial and the full blocks along the last axis of `state` (or the one before), and their counts."""
    outer, inner = state.shape[-2:]
    strides = (inner, 1)
    if transposed:
        outer, inner, strides = inner, outer, (1, inner)
    lead = state.shape[:-2]
    blocks = torch.empty(2, *lead, outer, inner, dtype=torch.int32, device=state.device)
    counts = torch.empty(2, *lead, outer, dtype=torch.int32, device=state.device)
    step = min(1024, triton.next_power_of_2(inner))
    _list_blocks[(counts[0].numel(),)](
        state, blocks, counts, needs, 1 << 30, outer, inner, *strides, blocks[0].numel(), counts[0].numel(), STEP=step
    )
    return blocks, counts


def schedule(layout: Layout, block_m: int, block_n: int) -> Layout:
    """The layout with its `Schedule` for blocks of `block_m` rows by `block_n` keys."""
    batch, rows = layout.queries.shape
    keys, patterns, device = layout.role.shape[1], len(layout.rules), layout.role.device
    q_blocks, k_blocks = triton.cdiv(rows, block_m), triton.cdiv(keys, block_n)
    padded = q_blocks * block_m
    split = torch.full((3, batch, patterns, padded), -1, dtype=torch.int32, device=device)
    soft, rest, source = split
    needs = torch.zeros(5, dtype=torch.int32, device=device)
    step = min(1024, triton.next_power_of_2(rows))
    _sort_rows[(batch, patterns)](
        layout.role, layout.queries, layout.rules, soft, rest, source, needs, keys, rows, padded, patterns,
        SIMPLE=layout.mask is None, STEP=step,
    )  # fmt: skip
    kinds = 1 if layout.groups == 1 else 1 + layout.groups
    state = torch.empty(kinds, batch, patterns, q_blocks, k_blocks, dtype=torch.int8, device=device)
    _classify[(k_blocks, q_blocks, batch * patterns)](
        soft, state, layout.queries, layout.rules, *layout.pair_facts, keys, rows, padded, batch, patterns,
        q_blocks, k_blocks, GROUPS=kinds,
        PLACES=layout.page is not None, SEGMENTS=layout.segment is not None, MASKED=layout.mask is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    blocks, counts = list_blocks(state, needs)
    order = counts[:, 0].sum(0).argsort(-1, descending=True).int()
    n_soft, n_rest, partial, full, gaps = needs.tolist()
    made = Schedule(
        block_m=block_m,
        block_n=block_n,
        soft=soft,
        rest=rest,
        source=source,
        state=state,
        blocks=blocks,
        counts=counts,
        order=order,
        soft_blocks=triton.cdiv(n_soft, block_m),
        rest_blocks=triton.cdiv(n_rest, block_m),
        longest=partial + full,
        contiguous=not gaps,
    )
    return replace(layout, schedule=made)
