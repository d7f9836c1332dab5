"""SCOPE (Deng et al., NeurIPS 2025): greedily cover what the patches show, weighted by CLS attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.errors import PlanError
from mmefficient.kernels.greedy_select import greedy_select
from mmefficient.likeness import cosines
from mmefficient.points import SHARED, Positions, Reducer, Selection, VisualTokens, about, order_selection
from mmefficient.points import Scope as Sharing


@dataclass(frozen=True)
class Scope(Reducer):
    """A patch is covered as far as its likest kept patch is like it; picks add the most coverage times saliency."""

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    summary: ClassVar[str] = "keep patches that cover the picture, weighted by what the CLS token looks at"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    class_token: ClassVar[str] = "attention from all patches of that layer"

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    alpha: float = field(default=1.0, metadata=about("power of the attention in the weight; 0 = coverage alone"))
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )
    scope: Sharing = field(default="tile", metadata=SHARED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise PlanError(f"scope: alpha={self.alpha} is negative; give 0 or more.")

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.tower is not None
        weight = tokens.tower.attention**self.alpha
        likeness = cosines(tokens.tower.features)
        order = greedy_select(likeness, tokens.valid, max(counts), objective="coverage", weight=weight)
        return order_selection(order, counts)
