"""`drop_alike` in plain torch: the specification every faster version is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def drop_alike(
    alike: torch.Tensor,
    ranked: torch.Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    counts: Sequence[int],
    step: int,
) -> torch.Tensor:
    """See the public function."""
    found = ranked.new_zeros(len(ranked), max(counts))
    for unit, (start, end, count) in enumerate(zip(starts, ends, counts, strict=True)):
        items = ranked[unit, start : end if count else start]
        while len(items) > count:
            even, odd = items[::2], items[1::2]
            drop = min(step, len(items) - count, len(even))
            likeness = alike[unit][even[:, None], odd].amax(1)
            stay = likeness.argsort(descending=True, stable=True)[drop:]
            items = torch.cat([even[stay], odd])
        found[unit, :count] = items
    return found
