"""FastV (Chen et al., ECCV 2024): after a few layers, keep the visual tokens the last prompt row attends to most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.points import Reducer, VisualTokens, about


@dataclass(frozen=True)
class FastV(Reducer):
    """Scores come from layer `layer` - 1: last prompt row, mean over heads (the released code's rule)."""

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    summary: ClassVar[str] = "keep the visual tokens that the last prompt token attends to most in an early layer"
    needs: ClassVar[frozenset[str]] = frozenset({"last_row_attention"})

    layer: int = field(
        default=2, metadata=about("decoder layer at whose input tokens leave; scores come from the layer before")
    )
    keep: float | int = field(
        default=0.5, metadata=about("visual tokens that stay, per image: a fraction in (0, 1] or a count")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer == 0:
            raise PlanError("fastv: layer=0 has no layer before it to take attention from; use layer >= 1.")

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention
