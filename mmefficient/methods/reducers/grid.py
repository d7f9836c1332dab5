"""Uniform grid selection: a baseline that keeps coverage and looks at nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.points import SHARED, Positions, Reducer, Scope, Selection, VisualTokens, about, order_selection


@dataclass(frozen=True)
class Grid(Reducer):
    """Evenly spaced patches of every view, exactly as many as the budget grants."""

    name: ClassVar[str] = "grid"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07143"
    summary: ClassVar[str] = "keep an evenly spaced subset of the patch grid (baseline)"
    needs: ClassVar[frozenset[str]] = frozenset({"full_grid"})

    keep: float | int = field(
        default=0.5, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    positions: Positions = field(
        default="keep", metadata=about("'keep' the position ids, or 'compact' them", quiet=True)
    )
    scope: Scope = field(default="image", metadata=SHARED)

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        chosen = [places(unit.grids, count) for unit, count in zip(tokens.units, counts, strict=True)]
        padded = torch.zeros(len(chosen), max(counts), dtype=torch.long)
        for place, index in enumerate(chosen):
            padded[place, : len(index)] = torch.tensor(index)
        return order_selection(padded.to(tokens.valid.device), counts)


def places(grids: Sequence[tuple[int, int]], count: int) -> list[int]:
    """`count` evenly spaced places in grids that lie one after the other; each grid gets its share by area."""
    areas = [rows * cols for rows, cols in grids]
    found, start, seen = [], 0, 0
    for (rows, cols), area in zip(grids, areas, strict=True):
        share = count * (seen + area) // sum(areas) - count * seen // sum(areas)
        lines = min(rows, share, max(1, -(-share // cols), round(rows * (share / area) ** 0.5)))
        for line in range(lines):
            here = share * (line + 1) // lines - share * line // lines
            row = (2 * line + 1) * rows // (2 * lines)
            found += [start + row * cols + (2 * i + 1) * cols // (2 * here) for i in range(here)]
        start, seen = start + area, seen + area
    return found
