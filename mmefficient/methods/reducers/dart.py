"""DART (Wen et al., EMNLP 2025): keep a few pivots, and the visual tokens that are least like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.errors import PlanError
from mmefficient.points import SHARED, Reducer, Scope, Selection, VisualTokens, about, order_selection


@dataclass(frozen=True)
class Dart(Reducer):
    """Pivots have the largest keys in the layer before; each takes its share of the tokens least like it, in turn."""

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    summary: ClassVar[str] = "keep visual tokens that duplicate a few pivot tokens the least"
    many_turns: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"question", "key_norm", "final_norm"})

    layer: int = field(
        default=2, metadata=about("decoder layer at whose input tokens leave; keys come from the layer before")
    )
    keep: float | int = field(
        default=0.222, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    image_pivots: int = field(default=4, metadata=about("pivots among the visual tokens, which stay", quiet=True))
    text_pivots: int = field(default=4, metadata=about("pivots among the tokens of the question", quiet=True))
    scope: Scope = field(default="image", metadata=SHARED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer == 0:
            raise PlanError("dart: layer=0 has no layer before it to take keys from; use layer >= 1.")
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise PlanError(f"{self}: at least one pivot is a visual token, and no number is negative.")

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        question, norms = tokens.question, tokens.key_norm
        assert question is not None
        assert question.key_norm is not None
        assert norms is not None
        hidden = F.normalize(tokens.hidden.float(), dim=-1)
        width = tokens.valid.shape[1]
        wanted = torch.tensor(counts, device=hidden.device)[:, None]
        mine, mine_used = largest(norms, tokens.valid, self.image_pivots)
        mine_used = mine_used & (torch.arange(mine.shape[1], device=mine.device) < wanted)
        theirs, theirs_used = largest(question.key_norm, question.valid, self.text_pivots)
        states = F.normalize(question.hidden.float(), dim=-1)
        # pivots take turns in prompt order
        places, used = zip(*(_ascending(p, u) for p, u in ((mine, mine_used), (theirs, theirs_used))), strict=True)
        pivots = torch.cat([_rows(x, p) for x, p in zip((hidden, states), places, strict=True)], 1)
        active = torch.cat(used, 1)
        alike = pivots @ hidden.transpose(1, 2)  # [U, pivots, N]
        chosen = torch.zeros(tokens.valid.shape, dtype=torch.long, device=hidden.device)
        chosen = chosen.scatter_add(1, places[0], used[0].long()) > 0
        left = wanted - chosen.sum(1, keepdim=True)
        nth, total = active.long().cumsum(1), active.sum(1, keepdim=True).clamp(min=1)
        shares = (nth * left // total - (nth - 1) * left // total) * active
        for turn in range(pivots.shape[1]):
            free = tokens.valid & ~chosen
            unlike = alike[:, turn].masked_fill(~free, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
            chosen = chosen | (free & (unlike < shares[:, turn, None]))
        place = torch.arange(width, device=hidden.device)
        return order_selection(torch.where(chosen, place, place + width).argsort(dim=1), counts)


def largest(norms: torch.Tensor, valid: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the `count` largest of `norms` [U, N], and which of them there are; ties go to the earlier token."""
    order = norms.masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, :count]
    return order, valid.gather(1, order)


def _ascending(places: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.where(used, places, torch.iinfo(torch.long).max).argsort(dim=1, stable=True)
    return places.gather(1, order), used.gather(1, order)


def _rows(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
