"""`greedy_select` in Triton: one launch runs every step; a unit's columns are shared out over programs if that pays.

Programs of one unit meet at a counter in every step, so all of them must run at the same time: the launch is
cooperative, which either guarantees that or fails.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import processors

_LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)

# numbers of a block of rows that one program holds at once, and its warps, from how many items on
_SIZES = {
    "max_min": ((2049, 8192, 16), (0, 8192, 8)),
    "coverage": ((1025, 16384, 16), (0, 8192, 8)),
    "volume": ((1025, 4096, 4), (0, 8192, 8)),
}


@triton.jit
def _packed(score, place):
    """int64 that is ordered like the scores, and among equal scores puts the earlier place first."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def _score_of(packed):
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _cover(pairs, cover, pick, items, p_n, ROWS: tl.constexpr):
    """Let `pick` cover what it is like."""
    for at in range(0, items, ROWS):
        row = at + tl.arange(0, ROWS)
        there = row < items
        covered = tl.load(cover + row, mask=there, other=0.0)
        latest = tl.load(pairs + pick.to(tl.int64) * p_n + row, mask=there, other=0.0)
        tl.store(cover + row, tl.maximum(covered, latest), mask=there)


@triton.jit
def _gain(pairs, cover, column, real, items, p_n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What each column would add to the coverage; rows are summed up last, so that no block waits for another."""
    parts = tl.zeros([ROWS, BLOCK], tl.float32)
    for at in range(0, items, ROWS):
        row = at + tl.arange(0, ROWS)[:, None]
        there = row < items
        covered = tl.load(cover + row, mask=there, other=float("inf"))
        inside = there & real[None]
        value = tl.load(pairs + row.to(tl.int64) * p_n + column[None], mask=inside, other=float("-inf"))
        parts += tl.maximum(value - covered, 0.0)
    return tl.sum(parts, 0)


@triton.jit
def _explained(factor, pick, step, column, real, items, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Product of the pick's column of the Cholesky factor, as far as it is known, with all other columns."""
    parts = tl.zeros([ROWS, BLOCK], tl.float32)
    for at in range(0, step, ROWS):
        k = at + tl.arange(0, ROWS)[:, None]
        there = k < step
        mine = tl.load(factor + k * items + pick, mask=there, other=0.0)
        theirs = tl.load(factor + k * items + column[None], mask=there & real[None], other=0.0)
        parts += mine * theirs
    return tl.sum(parts, 0)


@triton.jit
def _select(
    pairs, valid, first, order, best, arrivals, scratch, p_u, p_n, items, steps,
    RULE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    unit = tl.program_id(1).to(tl.int64)
    pairs += unit * p_u
    column = part * BLOCK + tl.arange(0, BLOCK)
    real = column < items
    left = real & (tl.load(valid + unit * items + column, mask=real, other=0) != 0)
    state = tl.load(first + unit * items + column, mask=real, other=0.0)
    remaining = state
    if RULE == "volume":
        remaining = tl.load(pairs + column.to(tl.int64) * p_n + column, mask=real, other=0.0)
        scratch += unit * steps * items
    if RULE == "coverage":
        scratch += (unit * PARTS + part) * items
    for step in range(0, steps):
        if RULE == "max_min":
            score = state
        elif RULE == "coverage":
            score = _gain(pairs, scratch, column, real, items, p_n, BLOCK, ROWS) * state
        else:
            score = tl.where(remaining > state, remaining, 0.0)
        packed = tl.max(tl.where(left, _packed(score, column), _LOWEST), 0)
        tl.debug_barrier()  # what this program wrote to `scratch` is there before anybody goes on
        if PARTS > 1:
            slot = best + unit * steps + step
            tl.atomic_max(slot, packed)
            arrived = tl.atomic_add(arrivals + unit, 1) + 1
            while arrived < PARTS * (step + 1):
                arrived = tl.atomic_add(arrivals + unit, 0)
            packed = tl.atomic_max(slot, _LOWEST)
        pick = tl.minimum(0x7FFFFFFF - (packed & 0xFFFFFFFF), items - 1).to(tl.int32)
        if part == 0:
            tl.store(order + unit * steps + step, pick.to(tl.int64))
        left = left & (column != pick)
        if RULE == "coverage":
            _cover(pairs, scratch, pick, items, p_n, 1024)
            tl.debug_barrier()  # every thread of the program reads it
        else:
            row = tl.load(pairs + pick.to(tl.int64) * p_n + column, mask=real, other=0.0)
            if RULE == "max_min":
                state = tl.where(step == 0, row, tl.minimum(state, row))
            else:
                own = _score_of(packed)
                known = _explained(scratch, pick, step, column, real, items, BLOCK, ROWS)
                root = tl.sqrt_rn(tl.where(own > 0, own, 1.0))
                new = tl.where(own > 0, tl.div_rn(row - known, root + tl.zeros([BLOCK], tl.float32)), 0.0)
                tl.store(scratch + step * items + column, new, mask=real)
                remaining -= new * new


def greedy_select(
    pairs: torch.Tensor, valid: torch.Tensor, first: torch.Tensor, steps: int, objective: str, **override: Any
) -> torch.Tensor:
    """See the public function; `first` is what `reference.first_scores` gives. `override`: PARTS, TILE, num_warps."""
    units, items = valid.shape
    device = pairs.device
    pairs = pairs.float()
    pairs = pairs if pairs.stride(2) == 1 else pairs.contiguous()
    parts = override.pop("PARTS", 0) or shares(units, items, objective, device)
    block = triton.next_power_of_2(triton.cdiv(items, parts))
    parts = triton.cdiv(items, block)
    order = torch.empty(units, steps, dtype=torch.int64, device=device)
    best = arrivals = order
    if parts > 1:
        best = torch.full((units, steps), _LOWEST.value, dtype=torch.int64, device=device)
        arrivals = torch.zeros(units, dtype=torch.int32, device=device)
    if objective == "coverage":  # nothing there is left to cover where nothing is
        infinite = torch.where(valid, 0.0, float("inf"))
        scratch = infinite[:, None].expand(-1, parts, -1).contiguous()
    elif objective == "volume":
        scratch = torch.empty(units, steps, items, dtype=torch.float32, device=device)
    else:
        scratch = first
    tile, warps = next((tile, warps) for least, tile, warps in _SIZES[objective] if items >= least)
    rows = max(1, override.pop("TILE", tile) // block)
    sizes = {"ROWS": rows, "num_warps": warps} | override
    if device.type == "cuda" and parts > 1:
        sizes["launch_cooperative_grid"] = True
    _select[(parts, units)](
        pairs, valid, first.contiguous(), order, best, arrivals, scratch, pairs.stride(0), pairs.stride(1), items,
        steps, RULE=objective, PARTS=parts, BLOCK=block, **sizes,
    )  # fmt: skip
    return order


def shares(units: int, items: int, objective: str, device: torch.device) -> int:
    """Programs that share a unit's columns: as many as fit beside those of the other units, if a step is long enough.

    A max-min step reads one row, which one program does in the time that meeting another would take.
    """
    if device.type != "cuda" or objective == "max_min" or (objective == "volume" and items <= 1024):
        return 1
    smallest = 32 if objective == "coverage" else 64
    return max(1, min(processors(device) // units, -(-items // smallest)))
