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
        units: list[Unit] = []
        key = torch.full_like(tokens.role, -1)
        for row, visual in enumerate(tokens.visual):
            at = visual.nonzero()[:, 0]
            if not len(at):
                continue
            image, tile = tokens.image[row, at], tokens.tile[row, at]
            crop = image * (int(tile.max()) + 1) + tile
            label = {"prompt": torch.zeros_like(image), "image": image, "tile": crop}[scope]
            _, ordinal = label.unique(return_inverse=True)
            key[row, at] = ordinal
            for number in range(int(ordinal.max()) + 1):
                mine = at[ordinal == number]
                first = mine[0]
                names = {
                    "prompt": "its prompt",
                    "image": f"image {int(tokens.image[row, first])}",
                    "tile": f"crop {int(tokens.tile[row, first])} of image {int(tokens.image[row, first])}",
                }
                units.append(Unit(row, names[scope], number, len(mine), _grids(tokens, row, mine)))
        rows = torch.tensor([unit.row for unit in units], dtype=torch.long, device=device)
        ordinals = torch.tensor([unit.ordinal for unit in units], dtype=torch.long, device=device)
        return cls(tuple(units), rows, ordinals, key.to(device))

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


def _grids(tokens: TokenMap, row: int, at: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """(rows, cols) of each view among positions `at`; () unless all are complete."""
    grids = []
    for image, view in torch.stack([tokens.image[row, at], tokens.view[row, at]]).unique_consecutive(dim=1).T:
        mine = at[(tokens.image[row, at] == image) & (tokens.view[row, at] == view)]
        rows, cols = tokens.row[row, mine], tokens.col[row, mine]
        grid = (len(rows.unique()), len(cols.unique()))
        if grid[0] * grid[1] != len(mine) or int(rows.min()) < 0:
            return ()
        grids.append(grid)
    return tuple(grids)
