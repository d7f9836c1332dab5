"""PACT (Dhouib et al., CVPR 2025): unimportant tokens leave, tokens that say the same are merged and weigh more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.errors import PlanError
from mmefficient.points import OwnHeads, Reducer, Selection, VisualTokens, about, order_selection

SCALE = 2.0  # of distances in a density, as published


@dataclass(frozen=True)
class Pact(Reducer):
    """Importance from the layer's own queries and keys, clusters from its rotated keys; no attention map."""

    name: ClassVar[str] = "pact"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.08966"
    summary: ClassVar[str] = "drop unimportant visual tokens and merge duplicates, which then count by their number"
    needs: ClassVar[frozenset[str]] = frozenset({"own_heads"})
    adaptive: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    layer: int = field(default=4, metadata=about("decoder layer at whose input tokens leave"))
    keep: float | int = field(
        default=0.55, metadata=about("important tokens, per image; clustering keeps fewer: a fraction or a count")
    )
    cutoff: float = field(default=0.21, metadata=about("cosine distance within which tokens are duplicates"))
    reach: float = field(default=1.5, metadata=about("times the cutoff: how far a dropped token may be recovered"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cutoff", "reach"):
            value = getattr(self, name)
            if value < 0:
                raise PlanError(f"pact: {name}={value} is negative; give 0 or more.")

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        assert tokens.own is not None
        valid, width = tokens.valid, tokens.valid.shape[1]
        score = importance(tokens.own, valid) * tokens.hidden.float().norm(dim=-1)
        rank = score.masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        wanted = [self.budget(unit) if unit.count else 0 for unit in tokens.units]
        important = valid & (rank < torch.tensor(wanted, device=rank.device)[:, None])
        keys = F.normalize(tokens.own.rotated.float().transpose(1, 2).flatten(2), dim=-1)
        apart = 1 - keys @ keys.transpose(1, 2)
        centre = centres(apart, important, self.cutoff)
        place = torch.arange(width, device=rank.device)
        gap, nearest = apart.masked_fill(~centre[:, None], float("inf")).min(2)
        nearest = torch.where(centre, place, nearest)
        joins = valid & (centre | (gap <= self.reach * self.cutoff))
        counts = centre.sum(1).tolist()
        selection = order_selection(torch.where(centre, place, place + width).argsort(dim=1), counts)
        member = F.one_hot(nearest, width).transpose(1, 2) * joins[:, None]  # [U, centre, token]
        mean = member / member.sum(2, keepdim=True).clamp(min=1)
        rows = selection.index[..., None].expand(-1, -1, width)
        return Selection(selection.index, selection.valid, mean.gather(1, rows)), counts


def importance(own: OwnHeads, valid: torch.Tensor) -> torch.Tensor:
    """Probability each key receives from the mean query, neither rotated, mean over heads, float32 [U, N]."""
    count = valid.sum(1).clamp(min=1)[:, None, None]
    query = own.query.float().masked_fill(~valid[:, None, :, None], 0.0).sum(2) / count  # [U, H, d]
    grouped = query.unflatten(1, (own.key.shape[1], -1))  # [U, G, H / G, d]
    logits = grouped @ own.key.float().transpose(2, 3) * query.shape[-1] ** -0.5
    return logits.masked_fill(~valid[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0).mean((1, 2))


def centres(apart: torch.Tensor, among: torch.Tensor, cutoff: float) -> torch.Tensor:
    """bool [U, N]: going from dense to sparse, every token that no centre is within `cutoff` of becomes a centre.

    Density is the sum of exp(-(distance / 2)^2) over `among`. All tokens that no undecided denser one is near are
    decided at once, which gives what one at a time gives; the device is waited for once per round. Ties in density go
    to the earlier token.

    Args:
        apart: float32 [U, N, N], symmetric; among: bool [U, N], the tokens that are clustered.
    """
    both = among[:, :, None] & among[:, None]
    density = torch.exp(-((apart / SCALE) ** 2)).masked_fill(~both, 0.0).sum(2)
    rank = density.masked_fill(~among, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    near = (apart <= cutoff) & both
    denser = near & (rank[:, None] < rank[..., None])
    found, open_ = torch.zeros_like(among), among
    while bool(open_.any()):
        new = open_ & ~(denser & open_[:, None]).any(2)
        found = found | new
        open_ = open_ & ~new & ~(near & new[:, None]).any(2)
    return found
