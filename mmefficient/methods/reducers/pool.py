"""Average pooling of the patch grid: what a smaller image would do, after the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch

from mmefficient.errors import BudgetError
from mmefficient.points import Positions, Reducer, Selection, Unit, VisualTokens, about, resolve_budget


@dataclass(frozen=True)
class Pool(Reducer):
    """Every view is averaged down to the grid nearest to the budget that keeps its aspect ratio."""

    name: ClassVar[str] = "pool"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07143"
    summary: ClassVar[str] = "average neighbouring patches into a coarser grid (baseline)"
    needs: ClassVar[frozenset[str]] = frozenset({"full_grid"})

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay, per image: a fraction in (0, 1] or a count")
    )
    positions: Positions = field(
        default="keep", metadata=about("'keep' the position ids, or 'compact' them", quiet=True)
    )

    def targets(self, unit: Unit) -> list[tuple[int, int]]:
        """Rows and columns of every view after pooling."""
        scale = (resolve_budget(self.keep, unit) / unit.count) ** 0.5
        return [(max(1, round(rows * scale)), max(1, round(cols * scale))) for rows, cols in unit.grids]

    def budget(self, unit: Unit) -> int:
        count = sum(rows * cols for rows, cols in self.targets(unit))
        if count > unit.count:
            raise BudgetError(f"row {unit.row}: {unit.label} is too small to be pooled by {self}.")
        return count

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        most = max(counts)
        units, width = tokens.valid.shape
        index = torch.zeros(units, most, dtype=torch.long)
        mix = torch.zeros(units, most, width)
        for place, unit in enumerate(tokens.units):
            start = done = 0
            for grid, target in zip(unit.grids, self.targets(unit), strict=True):
                weights = pooling(*grid, *target)
                centres = torch.cartesian_prod(middles(grid[0], target[0]) * grid[1], middles(grid[1], target[1]))
                index[place, done : done + len(weights)] = start + centres.sum(-1)
                mix[place, done : done + len(weights), start : start + weights.shape[1]] = weights
                start, done = start + weights.shape[1], done + len(weights)
        valid = torch.arange(most) < torch.tensor(counts)[:, None]
        device = tokens.valid.device
        return Selection(index.to(device), valid.to(device), mix.to(device))


def middles(length: int, target: int) -> torch.Tensor:
    """The old place nearest to the middle of each of `target` equal stretches of `length`."""
    return (2 * torch.arange(target) + 1) * length // (2 * target)


def overlaps(length: int, target: int) -> torch.Tensor:
    """[target, length]: share of each old place in each new one; rows sum to 1."""
    edges = torch.arange(target + 1) * (length / target)
    places = torch.arange(length)
    shared = torch.minimum(edges[1:, None], places + 1) - torch.maximum(edges[:-1, None], places)
    return shared.clamp(min=0) * (target / length)


@cache
def pooling(rows: int, cols: int, to_rows: int, to_cols: int) -> torch.Tensor:
    """[to_rows * to_cols, rows * cols]: averages weighted by the area a patch shares with the new cell."""
    return torch.kron(overlaps(rows, to_rows), overlaps(cols, to_cols))
