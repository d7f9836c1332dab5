"""`drop_alike` in Triton: one program per unit runs every round, with the list in memory and one sort per round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def _drop(
    alike, lists, out, bounds, a_u, a_n, items, most, step,
    HALF: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    alike += unit * a_u
    count = tl.load(bounds + unit * 2 + 1)
    held = tl.where(count > 0, tl.load(bounds + unit * 2), 0)
    source = lists + unit * 2 * items
    place = tl.arange(0, HALF)
    flip = 0
    while held > count:
        here, there = source + flip * items, source + (1 - flip) * items
        evens, odds = (held + 1) // 2, held // 2
        drop = tl.minimum(tl.minimum(step, held - count), evens)
        even = tl.load(here + 2 * place, mask=place < evens, other=0)
        parts = tl.full([HALF, ACROSS], float("-inf"), tl.float32)
        for at in range(0, odds, ACROSS):
            other = at + tl.arange(0, ACROSS)
            odd = tl.load(here + 2 * other + 1, mask=other < odds, other=0)
            inside = (place < evens)[:, None] & (other < odds)[None]
            value = tl.load(alike + even[:, None] * a_n + odd[None], mask=inside, other=float("-inf"))
            parts = tl.maximum(parts, value)
        best = tl.max(parts, 1)
        bits = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        # ordered like the likenesses, and among equal ones the earlier place first
        packed = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
        packed = tl.sort(tl.where(place < evens, packed, -0x7FFFFFFFFFFFFFFF), descending=True)
        from_place = 0x7FFFFFFF - (packed & 0xFFFFFFFF)
        stays = (place >= drop) & (place < evens)
        item = tl.load(here + 2 * from_place, mask=stays, other=0)
        tl.store(there + place - drop, item, mask=stays)
        odd = tl.load(here + 2 * place + 1, mask=place < odds, other=0)
        tl.store(there + evens - drop + place, odd, mask=place < odds)
        tl.debug_barrier()  # the next round reads what all threads have written
        held -= drop
        flip = 1 - flip
    for at in range(0, held, HALF):
        kept = tl.load(source + flip * items + at + place, mask=at + place < held, other=0)
        tl.store(out + unit * most + at + place, kept, mask=at + place < held)


def drop_alike(
    alike: torch.Tensor,
    ranked: torch.Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    counts: Sequence[int],
    step: int,
) -> torch.Tensor:
    """See the public function."""
    units, items = ranked.shape
    device = ranked.device
    alike = alike.float()
    alike = alike if alike.stride(2) == 1 else alike.contiguous()
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    bounds = torch.tensor(list(zip(lengths, counts, strict=True)), dtype=torch.int32, device=device)
    shift = torch.tensor(starts, device=device)[:, None] + torch.arange(items, device=device)
    lists = torch.empty(units, 2, items, dtype=torch.int64, device=device)
    lists[:, 0] = ranked.gather(1, shift.clamp(max=items - 1))
    found = torch.zeros(units, max(counts), dtype=torch.int64, device=device)
    half = max(16, triton.next_power_of_2((max(lengths) + 1) // 2))
    _drop[(units,)](
        alike, lists, found, bounds, alike.stride(0), alike.stride(1), items, max(counts), step,
        HALF=half, ACROSS=16, num_warps=8,
    )  # fmt: skip
    return found
