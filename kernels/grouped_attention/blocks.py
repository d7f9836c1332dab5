"""Which blocks of rows and keys hold pairs, listed both ways: what the backward walks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div, power_above
from mmefficient.kernels.grouped_attention.layout import Layout
from mmefficient.kernels.grouped_attention.schedule import known_of, pairs, query_facts


@triton.jit
def _classify(
    role, page, row, col, segment, group, mask, queries, rules, state, keys, rows, patterns, q_blocks, k_blocks,
    PLACES: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """State of one block of rows and keys in their own order: no pair exists (0), some do (1), or all (2)."""
    kb = tl.program_id(0)
    qb = tl.program_id(1)
    bs = tl.program_id(2)
    b = bs // patterns
    rules += bs % patterns * 6
    n = qb * BLOCK_M + tl.arange(0, BLOCK_M)
    key = kb * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.load(queries + b * rows + n, mask=n < rows, other=-1)
    known = known_of(role, page, row, col, segment, group, mask, b, keys, rows)
    facts = query_facts(own, rules, known, PLACES, SEGMENTS)
    ok = pairs(facts, own, key, tl.where(n < rows, n, -1), rules, known, keys, PLACES, SEGMENTS, MASKED)
    some = tl.max(tl.max(ok.to(tl.int32), 1), 0)
    every = tl.min(tl.min((ok | (n >= rows)[:, None]).to(tl.int32), 1), 0)
    tl.store(state + (bs * q_blocks + qb).to(tl.int64) * k_blocks + kb, some + every)


@triton.jit
def _list_blocks(state, blocks, counts, outer, inner, stride_out, stride_in, half, half_counts, STEP: tl.constexpr):
    """Collect the blocks along one line of `state` that hold some pairs, and those that hold all."""
    line = tl.program_id(0)
    at = state + (line // outer).to(tl.int64) * (outer * inner) + (line % outer) * stride_out
    for kind in tl.static_range(2):
        found = 0
        for start in range(0, inner, STEP):
            i = start + tl.arange(0, STEP)
            hit = (tl.load(at + i * stride_in, mask=i < inner, other=0) == kind + 1).to(tl.int32)
            to = blocks + kind * half + line.to(tl.int64) * inner + found + tl.cumsum(hit, 0) - 1
            tl.store(to, i, mask=hit != 0)
            found += tl.sum(hit, 0)
        tl.store(counts + kind * half_counts + line, found)


Lists = tuple[torch.Tensor, torch.Tensor]


def pairs_by_block(layout: Layout, block_m: int, block_n: int) -> tuple[Lists, Lists]:
    """For every block of rows the key blocks of which it sees some or all, and the reverse; kept with the schedule.

    Returns:
        twice (blocks, counts): int32 [2, B, S, Q, K] and [2, B, S, Q], then [2, B, S, K, Q] and [2, B, S, K]; index 0
        holds blocks with some pairs, 1 those with all. Rows stand in their own order.
    """
    made = layout.schedule
    known = made.launches if made is not None else {}
    key = ("pairs", block_m, block_n)
    if key in known:
        return known[key]
    (batch, rows), keys, patterns = layout.queries.shape, layout.role.shape[1], len(layout.rules)
    shape = (batch, patterns, ceil_div(rows, block_m), ceil_div(keys, block_n))
    state = torch.empty(shape, dtype=torch.int8, device=layout.role.device)
    _classify[(shape[3], shape[2], batch * patterns)](
        *layout.pair_facts, layout.queries, layout.rules, state, keys, rows, patterns, *shape[2:],
        PLACES=layout.page is not None, SEGMENTS=layout.segment is not None, MASKED=layout.mask is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    found = []
    for outer, inner, strides in ((shape[2], shape[3], (shape[3], 1)), (shape[3], shape[2], (1, shape[3]))):
        blocks = torch.empty(2, *shape[:2], outer, inner, dtype=torch.int32, device=state.device)
        counts = torch.empty(2, *shape[:2], outer, dtype=torch.int32, device=state.device)
        _list_blocks[(counts[0].numel(),)](
            state, blocks, counts, outer, inner, *strides, blocks[0].numel(), counts[0].numel(),
            STEP=min(1024, power_above(inner)),
        )  # fmt: skip
        found.append((blocks, counts))
    known[key] = (found[0], found[1])
    return found[0], found[1]
