"""LLaVA-PruMerge (Shang et al., ICCV 2025): patches that stand out in the CLS token's attention absorb their likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from mmefficient.outliers import StandsOut, outliers, with_rest, without_rest
from mmefficient.points import Positions, Scope, Selection, TowerLayer, VisualTokens, about

LAST = TowerLayer(layer=-1, joined=True)
NEIGHBOURS = 32


@dataclass(frozen=True)
class PruMerge(StandsOut):
    """Acts on tower features, per crop, before the projector; one token sums up what is not kept."""

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"
    summary: ClassVar[str] = "keep patches that stand out in the CLS token's attention, and merge the others into them"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    shared_by: ClassVar[Scope] = "tile"
    space: ClassVar[Literal["lm", "tower"]] = "tower"
    tower_layers: ClassVar[tuple[TowerLayer, ...]] = (LAST,)
    class_token: ClassVar[str] = "attention from all patches of that layer"

    keep: float | int | None = field(
        default=None,
        metadata=about("visual tokens that stay, per crop: a fraction, a count, or None = as many as stand out"),
    )
    plus: bool = field(default=False, metadata=about("also keep a grid of patches (PruMerge+)"))
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        assert tokens.tower is not None
        facts = tokens.tower.layers[LAST]
        attention = facts.attention.masked_fill(~tokens.valid, float("-inf"))
        rank = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = self.kept(rank, facts.attention, tokens)
        if self.keep is None:
            counts = [min(unit.count, held + 1) for unit, held in zip(tokens.units, kept.sum(1).tolist(), strict=True)]
        else:
            counts = [self.budget(unit) for unit in tokens.units]
        weight = facts.attention.masked_fill(~tokens.valid, 0.0)
        return with_rest(kept, tokens, counts, absorb(facts.keys, weight, tokens.valid), weight), counts

    def kept(self, rank: torch.Tensor, attention: torch.Tensor, tokens: VisualTokens) -> torch.Tensor:
        """bool [U, N]: the patches that are not only part of the rest."""
        if self.keep is None:
            found = outliers(attention, tokens)
            kept = rank < torch.tensor([max(1, count) for count in found], device=rank.device)[:, None]
            steps = [max(1, unit.count // max(1, count) // 3) for unit, count in zip(tokens.units, found, strict=True)]
            place = torch.arange(rank.shape[1], device=rank.device)
            last = torch.tensor([unit.count - 1 for unit in tokens.units], device=rank.device)[:, None]
            grid = (place % torch.tensor(steps, device=rank.device)[:, None] == 0) & (place < last)
            return (kept | grid if self.plus else kept) & tokens.valid
        wanted = without_rest([self.budget(unit) for unit in tokens.units], tokens)
        first = [max(1, count // 4) if self.plus else count for count in wanted]
        kept = (rank < torch.tensor(first, device=rank.device)[:, None]) & tokens.valid
        return kept | spread(tokens.valid & ~kept, [w - f for w, f in zip(wanted, first, strict=True)])


def absorb(keys: torch.Tensor, weight: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[U, N, N]: each patch, plus its `NEIGHBOURS` likest others (cosine of keys), each times its weight."""
    keys = F.normalize(keys.float(), dim=-1)
    width = valid.shape[1]
    eye = torch.eye(width, device=keys.device)
    likeness = (keys @ keys.transpose(1, 2)).masked_fill(~valid[:, None] | eye.bool(), float("-inf"))
    near = likeness.argsort(dim=2, descending=True, stable=True)[..., :NEIGHBOURS]
    shares = weight[:, None].expand(-1, width, -1).gather(2, near)
    shares = shares.masked_fill(likeness.gather(2, near) == float("-inf"), 0.0)
    return torch.zeros_like(likeness).scatter_(2, near, shares) + eye


def spread(free: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """bool [U, N]: `counts[u]` of the places `free` [U, N], evenly spaced among them."""
    wanted = torch.tensor(counts, device=free.device)[:, None]
    nth, total = free.long().cumsum(1), free.sum(1, keepdim=True).clamp(min=1)
    return free & (nth * wanted // total > (nth - 1) * wanted // total)
