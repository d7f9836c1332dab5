"""VisPruner (Zhang et al., ICCV 2025): important patches by CLS attention, plus diverse ones among the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.errors import PlanError
from mmefficient.points import Positions, Reducer, Scope, Selection, VisualTokens, about, order_selection

STEP = 8  # patches removed per round, as released


@dataclass(frozen=True)
class VisPruner(Reducer):
    """`important` of the budget goes to what the class token attends to, the rest to patches unlike each other."""

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    summary: ClassVar[str] = "keep the patches the CLS token looks at, and the most diverse of the rest"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    scope: ClassVar[Scope] = "tile"
    class_token: ClassVar[str] = "attention from all patches of that layer"

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay, per crop: a fraction in (0, 1] or a count")
    )
    important: float = field(default=0.5, metadata=about("share of them chosen by attention, in [0, 1]"))
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.important, bool) or not 0 <= self.important <= 1:
            raise PlanError(f"vispruner: important={self.important} is outside [0, 1].")

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.tower is not None
        features = F.normalize(tokens.tower.features.float(), dim=-1)
        attention = tokens.tower.attention.masked_fill(~tokens.valid, float("-inf"))
        ranked = attention.argsort(dim=1, descending=True, stable=True)
        order = torch.zeros(len(counts), max(counts), dtype=torch.long, device=ranked.device)
        for place, (unit, count) in enumerate(zip(tokens.units, counts, strict=True)):
            important = int(count * self.important)
            rest = diverse(features[place], ranked[place, important : unit.count], count - important)
            order[place, :count] = torch.cat([ranked[place, :important], rest])
        return order_selection(order, counts)


def diverse(features: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the `candidates` (places, best first), after repeatedly dropping those most like another one.

    Each round splits the list into even and odd places and drops the (at most `STEP`) even ones that are most like
    an odd one; the even ones that stay, most alike first, precede the odd ones in the next round.

    Args:
        features: [N, D], normalised; candidates: int64 [R].
    """
    if count == 0:
        return candidates[:0]
    while len(candidates) > count:
        even, odd = candidates[::2], candidates[1::2]
        drop = min(STEP, len(candidates) - count, len(even))
        likeness = (features[even] @ features[odd].T).amax(1)
        stay = likeness.argsort(descending=True, stable=True)[drop:]
        candidates = torch.cat([even[stay], odd])
    return candidates
