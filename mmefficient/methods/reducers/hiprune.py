"""HiPrune (Liu et al., AAAI 2026): what a middle and a late layer of the vision tower look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.points import Positions, Reducer, Scope, TowerLayer, VisualTokens, about, resolve_budget

REGISTERS = TowerLayer(rows="all")


@dataclass(frozen=True)
class HiPrune(Reducer):
    """Both rankings are by the attention that a patch receives from all rows. Budgets are per crop."""

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.00553"
    summary: ClassVar[str] = "keep what a middle layer of the tower looks at, with neighbours, and what a late one does"
    needs: ClassVar[frozenset[str]] = frozenset({"tower", "full_grid"})
    shared_by: ClassVar[Scope] = "tile"

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay, per crop: a fraction in (0, 1] or a count")
    )
    alpha: float = field(default=0.1, metadata=about("share of them that are anchors and their neighbours, in [0, 1]"))
    depth: float = field(default=0.375, metadata=about("share of the tower's layers at which anchors are chosen"))
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("alpha", self.alpha), ("depth", self.depth)):
            if not 0 <= value <= 1:
                raise PlanError(f"hiprune: {name}={value} is outside [0, 1].")

    @property
    def tower_layers(self) -> tuple[TowerLayer, ...]:  # type: ignore[override]
        return TowerLayer(float(self.depth), rows="all"), REGISTERS

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.tower is not None
        middle, late = (tokens.tower.layers[layer].attention for layer in self.tower_layers)
        anchors = [round(resolve_budget(self.keep, unit) * self.alpha / 5) for unit in tokens.units]
        ranked = middle.masked_fill(~tokens.valid, float("-inf")).argsort(dim=1, descending=True, stable=True)
        chosen = torch.zeros_like(late)
        grids = [unit.grids for unit in tokens.units]  # one each: a crop is one grid
        if max(anchors) > 0:
            # an anchor, then its left, right, upper and lower neighbour; over a row's end the next row goes on
            # torch.tensor, not new_tensor: the graph engine keeps what is made of host values by it
            widths = torch.tensor([columns for ((_, columns),) in grids], device=ranked.device)[:, None]
            moves = torch.cat([torch.zeros_like(widths), widths * 0 - 1, widths * 0 + 1, -widths, widths], 1)
            last = torch.tensor([unit.count - 1 for unit in tokens.units], device=ranked.device)[:, None, None]
            near = (ranked[:, : max(anchors), None] + moves[:, None]).clamp(min=0).minimum(last)
            used = (
                torch.arange(max(anchors), device=ranked.device) < torch.tensor(anchors, device=ranked.device)[:, None]
            )
            counted = used[..., None].expand_as(near).to(late.dtype)
            chosen = chosen.scatter_reduce_(1, near.flatten(1), counted.flatten(1), "amax")
        return late + 2 * chosen  # attention is at most 1
