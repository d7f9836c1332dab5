"""Units of visual tokens: who shares a budget, how many they are, and where they sit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mmefficient.points import Scope, Unit
from mmefficient.tokens import TokenMap


@dataclass(frozen=True)
class Units:
    """The units of one scope.

    Attributes:
        units: in order of row, then of prompt position; counts are known on the host, so packing needs no sync.
        rows: int64 [U], the batch row of each unit.
        ordinals: int64 [U], the number of each unit within its row.
        key: int64 [B, S], the ordinal of the unit each position belongs to; -1 = none.
    """

    units: tuple[Unit, ...]
    rows: torch.Tensor
    ordinals: torch.Tensor
    key: torch.Tensor

    @classmethod
    def of(cls, tokens: TokenMap, scope: Scope, device: torch.device) -> Units:
        """Units of a prompt; `tokens` lives on the CPU, the result's tensors on `device`."""
        at = tokens.visual.nonzero(as_tuple=True)
        image, view = tokens.image[at], tokens.view[at]
        parts = {
            "prompt": [],
            "image": [image],
            "tile": [image, tokens.tile[at]],
            "frame": [image, tokens.frame[at]],
        }[scope]
        names, member, counts = _groups([at[0], *parts])
        rows = torch.tensor(names[0], dtype=torch.long)
        ordinals = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
        key = torch.full_like(tokens.role, -1)
        key[at] = ordinals[member]
        grids = _grids([member, image, view], tokens.row[at], tokens.col[at], len(rows))
        units = tuple(
            Unit(row, _label(scope, name), ordinal, count, grid)
            for row, *name, ordinal, count, grid in zip(*names, ordinals.tolist(), counts.tolist(), grids, strict=True)
        )
        return cls(units, rows.to(device), ordinals.to(device), key.to(device))

    def with_counts(self, counts: Sequence[int]) -> Units:
        """The same units after some of their tokens left."""
        units = tuple(
            unit if unit.count == count else replace(unit, count=count, grids=())
            for unit, count in zip(self.units, counts, strict=True)
        )
        return replace(self, units=units)

    def members(self, columns: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """bool [U, n]: which of the slots holding prompt positions `columns` [B, n] belong to each unit."""
        key = self.key.gather(1, columns)
        if valid is not None:
            key = key.masked_fill(~valid, -1)
        return key[self.rows] == self.ordinals[:, None]


def _label(scope: Scope, name: Sequence[int]) -> str:
    if scope == "prompt":
        return "its prompt"
    if scope == "image":
        return f"image {name[0]}"
    return f"{'crop' if scope == 'tile' else 'frame'} {name[1]} of image {name[0]}"


def _groups(labels: Sequence[torch.Tensor]) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Group tokens by their labels, each int64 [T] and >= 0: the labels of each group, its members, its counts."""
    bases = [int(label.max()) + 1 if len(label) else 1 for label in labels]
    code = labels[0]
    for label, base in zip(labels[1:], bases[1:], strict=True):
        code = code * base + label
    code, member, counts = code.unique(return_inverse=True, return_counts=True)
    names = []
    for base in reversed(bases[1:]):
        names.append((code % base).tolist())
        code = code // base
    return [code.tolist(), *reversed(names)], member, counts


def _grids(
    views: Sequence[torch.Tensor], row: torch.Tensor, col: torch.Tensor, units: int
) -> list[tuple[tuple[int, int], ...]]:
    """(rows, cols) of each view of each unit; () for a unit with a view that is no complete grid.

    Args:
        views: the unit, image and view of every visual token; row, col: its place; all int64 [T].
    """
    names, member, counts = _groups(views)
    sides = []
    for place in (row, col):
        low, high = (
            torch.zeros(len(counts), dtype=torch.long).scatter_reduce_(0, member, place, how, include_self=False)
            for how in ("amin", "amax")
        )
        sides.append(torch.where(low < 0, 0, high - low + 1).tolist())
    found: list[list[tuple[int, int]]] = [[] for _ in range(units)]
    broken = set()
    for unit, rows, cols, count in zip(names[0], *sides, counts.tolist(), strict=True):
        found[unit].append((rows, cols))
        if rows * cols != count:
            broken.add(unit)
    return [() if unit in broken else tuple(grids) for unit, grids in enumerate(found)]
