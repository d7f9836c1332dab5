"""`drop_alike` in Triton: one launch runs every round; a unit's even items are shared out over programs.

Programs of one unit meet twice in every round, so all of them must run at the same time: the launch is cooperative,
which either guarantees that or fails. Nothing is sorted: an item's rank is how many even ones are more alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import power_above, processors

_LOWEST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)

_TILE = 8192  # likenesses that one program holds at once


@triton.jit
def _meet(arrivals, times, PARTS: tl.constexpr):
    """Go on when all programs of the unit have been here `times` times, and see what they wrote before."""
    tl.debug_barrier()
    if PARTS > 1:
        arrived = tl.atomic_add(arrivals, 1) + 1
        while arrived < PARTS * times:
            arrived = tl.atomic_add(arrivals, 0)
        tl.debug_barrier()


@triton.jit
def _drop(
    alike, lists, keys, out, bounds, arrivals, a_u, a_n, items, most, step,
    PARTS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    unit = tl.program_id(1).to(tl.int64)
    alike += unit * a_u
    keys += unit * HALF
    count = tl.load(bounds + unit * 2 + 1)
    held = tl.where(count > 0, tl.load(bounds + unit * 2), 0)
    source = lists + unit * 2 * items
    across = tl.arange(0, HALF)
    flip = 0
    times = 0
    while held > count:
        here, there = source + flip * items, source + (1 - flip) * items
        evens, odds = (held + 1) // 2, held // 2
        drop = tl.minimum(tl.minimum(step, held - count), evens)
        odd = tl.load(here + 2 * across + 1, mask=across < odds, other=0, cache_modifier=".cg")
        for at in range(part * ROWS, evens, PARTS * ROWS):
            place = at + tl.arange(0, ROWS)
            even = tl.load(here + 2 * place, mask=place < evens, other=0, cache_modifier=".cg")
            inside = (place < evens)[:, None] & (across < odds)[None]
            best = tl.max(tl.load(alike + even[:, None] * a_n + odd[None], mask=inside, other=float("-inf")), 1)
            bits = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            # ordered like the likenesses, and among equal ones the earlier place first
            tl.store(keys + place, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64), mask=place < evens)
        times += 1
        _meet(arrivals + unit, times, PARTS)
        key = tl.load(keys + across, mask=across < evens, other=_LOWEST, cache_modifier=".cg")
        for at in range(part * ROWS, evens, PARTS * ROWS):
            place = at + tl.arange(0, ROWS)
            own = tl.load(keys + place, mask=place < evens, other=_LOWEST, cache_modifier=".cg")
            rank = tl.sum((key[None] > own[:, None]).to(tl.int32), 1)
            even = tl.load(here + 2 * place, mask=place < evens, other=0, cache_modifier=".cg")
            tl.store(there + rank - drop, even, mask=(place < evens) & (rank >= drop))
            follows = tl.load(here + 2 * place + 1, mask=place < odds, other=0, cache_modifier=".cg")
            tl.store(there + evens - drop + place, follows, mask=place < odds)
        times += 1
        _meet(arrivals + unit, times, PARTS)
        held -= drop
        flip = 1 - flip
    for at in range(part * HALF, held, PARTS * HALF):
        place = at + across
        kept = tl.load(source + flip * items + place, mask=place < held, other=0, cache_modifier=".cg")
        tl.store(out + unit * most + place, kept, mask=place < held)


def drop_alike(
    alike: torch.Tensor,
    ranked: torch.Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    counts: Sequence[int],
    step: int,
    **override: Any,
) -> torch.Tensor:
    """See the public function. `override`: PARTS, ROWS, num_warps."""
    units, items = ranked.shape
    device = ranked.device
    alike = alike.float()
    alike = alike if alike.stride(2) == 1 else alike.contiguous()
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    facts = torch.tensor([lengths, counts, starts], dtype=torch.int32, device=device)
    shift = facts[2][:, None] + torch.arange(items, device=device)
    lists = torch.empty(units, 2, items, dtype=torch.int64, device=device)
    lists[:, 0] = ranked.gather(1, shift.clamp(max=items - 1))
    found = torch.zeros(units, max(counts), dtype=torch.int64, device=device)
    evens = (max(lengths) + 1) // 2
    half = max(16, power_above(max(evens, 1)))
    rows = override.pop("ROWS", max(1, _TILE // half))
    parts = override.pop("PARTS", 0) or shares(units, evens, rows, device)
    sizes = {"num_warps": 8} | override
    if device.type == "cuda" and parts > 1:
        sizes["launch_cooperative_grid"] = True
    _drop[(parts, units)](
        alike, lists, torch.empty(units, half, dtype=torch.int64, device=device), found, facts[:2].T.contiguous(),
        torch.zeros(units, dtype=torch.int32, device=device), alike.stride(0), alike.stride(1), items, max(counts),
        step, PARTS=parts, HALF=half, ROWS=rows, **sizes,
    )  # fmt: skip
    return found


def shares(units: int, evens: int, rows: int, device: torch.device) -> int:
    """Programs that share a unit: one for `rows` even items, as many as fit beside those of the other units."""
    if device.type != "cuda":
        return 1
    return max(1, min(processors(device) // units, -(-evens // rows)))
