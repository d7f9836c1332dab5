"""DivPrune (Alvar et al., CVPR 2025): keep visual tokens that are as different from each other as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.kernels.greedy_select import greedy_select
from mmefficient.likeness import cosines
from mmefficient.points import SHARED, Positions, Reducer, Scope, Selection, VisualTokens, about, order_selection


@dataclass(frozen=True)
class DivPrune(Reducer):
    """Greedy max-min selection by cosine distance of the language model's input embeddings."""

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    summary: ClassVar[str] = "keep tokens that are as different from each other as possible"

    keep: float | int = field(
        default=0.098, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )
    scope: Scope = field(default="image", metadata=SHARED)

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        distance = 1 - cosines(tokens.hidden)
        return order_selection(greedy_select(distance, tokens.valid, max(counts), objective="max_min"), counts)
