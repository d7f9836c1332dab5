"""Random selection: the baseline every ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.points import SHARED, Positions, Reducer, Scope, VisualTokens, about


@dataclass(frozen=True)
class Random(Reducer):
    """A uniform draw without replacement per image; the same for the same seed, image number and token count."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.02650"
    summary: ClassVar[str] = "keep a random subset (baseline)"

    keep: float | int = field(
        default=0.5, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    seed: int = field(default=0, metadata=about("seed of the draw", quiet=True))
    positions: Positions = field(
        default="keep", metadata=about("'keep' the position ids, or 'compact' them", quiet=True)
    )
    scope: Scope = field(default="image", metadata=SHARED)

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        scores = torch.zeros(tokens.valid.shape)
        for place, unit in enumerate(tokens.units):
            # a generator per unit: what a row draws cannot depend on the rows beside it
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + unit.ordinal)
            scores[place, : unit.count] = torch.rand(unit.count, generator=generator)
        return scores.to(tokens.valid.device)
