"""TRIM (Song et al., COLING 2025): keep the patches that CLIP matches with the question, average the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from mmefficient.outliers import StandsOut, outliers, with_rest, without_rest
from mmefficient.points import Positions, Scope, Selection, VisualTokens, about


@dataclass(frozen=True)
class Trim(StandsOut):
    """Acts on tower features, per crop, before the projector; one token is the mean of what is not kept."""

    name: ClassVar[str] = "trim"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.10994"
    summary: ClassVar[str] = "keep the patches that match the question, and one token for the mean of the others"
    many_turns: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"tower", "match"})
    shared_by: ClassVar[Scope] = "tile"
    space: ClassVar[Literal["lm", "tower"]] = "tower"

    keep: float | int | None = field(
        default=None,
        metadata=about("visual tokens that stay, per crop: a fraction, a count, or None = as many as stand out"),
    )
    matcher: str = field(
        default="openai/clip-vit-large-patch14-336",
        metadata=about("what compares patches with the question: see docs/matchers.md"),
    )
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        assert tokens.match is not None
        scores = tokens.match.relevance(lengths=True).masked_fill(~tokens.valid, float("-inf")).softmax(1)
        if self.keep is None:
            standing = outliers(scores, tokens)
            counts = [min(unit.count, max(1, count) + 1) for unit, count in zip(tokens.units, standing, strict=True)]
        else:
            counts = [self.budget(unit) for unit in tokens.units]
        held = without_rest(counts, tokens)
        rank = scores.masked_fill(~tokens.valid, float("-inf")).argsort(dim=1, descending=True, stable=True)
        kept = (rank.argsort(dim=1) < torch.tensor(held, device=rank.device)[:, None]) & tokens.valid
        others = torch.tensor([unit.count for unit in tokens.units], device=rank.device) - kept.sum(1)
        mean = torch.ones_like(scores) / others.clamp(min=1)[:, None]
        eye = torch.eye(kept.shape[1], device=kept.device).expand(len(kept), -1, -1)
        return with_rest(kept, tokens, counts, eye, mean), counts
