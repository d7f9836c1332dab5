"""VisPruner (Zhang et al., ICCV 2025): important patches by CLS attention, plus diverse ones among the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.errors import PlanError
from mmefficient.kernels.drop_alike import drop_alike
from mmefficient.likeness import cosines
from mmefficient.points import SHARED, Positions, Reducer, Scope, Selection, VisualTokens, about, order_selection

STEP = 8  # patches removed per round, as released


@dataclass(frozen=True)
class VisPruner(Reducer):
    """`important` of the budget goes to what the class token attends to, the rest to patches unlike each other."""

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    summary: ClassVar[str] = "keep the patches the CLS token looks at, and the most diverse of the rest"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    class_token: ClassVar[str] = "attention from all patches of that layer"

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    important: float = field(default=0.5, metadata=about("share of them chosen by attention, in [0, 1]"))
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )
    scope: Scope = field(default="tile", metadata=SHARED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise PlanError(f"vispruner: important={self.important} is outside [0, 1].")

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.tower is not None
        attention = tokens.tower.attention.masked_fill(~tokens.valid, float("-inf"))
        ranked = attention.argsort(dim=1, descending=True, stable=True)
        important = [int(count * self.important) for count in counts]
        rest = drop_alike(
            cosines(tokens.tower.features),
            ranked,
            important,
            [unit.count for unit in tokens.units],
            [count - first for count, first in zip(counts, important, strict=True)],
            step=STEP,
        )
        place = torch.arange(max(counts), device=ranked.device)
        later = place - torch.tensor(important, device=ranked.device)[:, None]
        others = F.pad(rest, (0, 1)).gather(1, later.clamp(0, rest.shape[1]))
        return order_selection(torch.where(later < 0, ranked[:, : max(counts)], others), counts)
