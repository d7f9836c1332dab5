"""FasterVLM (Zhang et al., 2024): keep the patches that the vision tower's class token attends to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.points import SHARED, Positions, Reducer, Scope, VisualTokens, about


@dataclass(frozen=True)
class FasterVLM(Reducer):
    """Scores come from the layer whose output is used: class row, mean over heads. Budgets are per crop."""

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    summary: ClassVar[str] = "keep the patches the CLS token looks at"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    class_token: ClassVar[str] = "attention from all patches of that layer"

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )
    scope: Scope = field(default="tile", metadata=SHARED)

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.tower is not None
        return tokens.tower.attention
