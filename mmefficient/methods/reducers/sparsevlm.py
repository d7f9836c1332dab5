"""SparseVLM (Zhang et al., ICML 2025): words that match the image rank visual tokens; some that leave are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.methods.reducers.pyramiddrop import check_shares, part
from mmefficient.points import Reducer, Selection, Unit, VisualTokens, about, at_depths, order_selection
from mmefficient.profiles import Checkpoint

DEPTHS = (3 / 32, 7 / 32, 16 / 32)  # published: after layers 2, 6 and 15 of 32


@dataclass(frozen=True)
class SparseVLM(Reducer):
    """Three stages; each scores with the layer before it, and merges the best of what it drops into a few tokens."""

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    summary: ClassVar[str] = (
        "drop visual tokens in three stages, by the attention of question words that match the image"
    )
    many_turns: ClassVar[bool] = False

    shares: tuple[float, ...] = field(
        default=(0.521, 0.347, 0.191),  # 300, 200 and 110 of 576
        metadata=about("visual tokens kept by each stage, as shares of the image's; recycled ones come on top"),
    )
    recycle: float = field(default=0.3, metadata=about("share of the dropped tokens that is merged; 0 = none"))
    layers: tuple[int, ...] = field(
        default=(),
        metadata=about("decoder layers at whose input they leave; () = 3/32, 7/32 and 16/32 of the model", quiet=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.name, self.shares, len(DEPTHS))
        if not 0 <= self.recycle < 1:
            raise PlanError(f"sparsevlm: recycle={self.recycle} is outside [0, 1).")

    def stages(self, checkpoint: Checkpoint) -> tuple[Reducer, ...]:
        layers = at_depths(self.name, self.layers, DEPTHS, checkpoint.layers)
        return tuple(_Stage(layer, share, self.recycle) for layer, share in zip(layers, self.shares, strict=True))


@dataclass(frozen=True)
class _Stage(Reducer):
    name: ClassVar[str] = "sparsevlm"
    needs: ClassVar[frozenset[str]] = frozenset({"question_attention"})

    layer: int
    share: float
    recycle: float

    def raters(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.question is not None
        return matching_words(tokens.hidden, tokens.valid, tokens.question.hidden, tokens.question.valid)

    def split(self, unit: Unit) -> tuple[int, int, int]:
        """Tokens kept, dropped tokens to be merged, and tokens they are merged into."""
        kept = part(self.share, unit)
        pool = int(self.recycle * (unit.count - kept)) + 1 if self.recycle else 0
        if pool > unit.count - kept:
            return kept, 0, 0
        return kept, pool, pool // 10 + 1 if pool else 0

    def budget(self, unit: Unit) -> int:
        kept, _, merged = self.split(unit)
        return kept + merged

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.attention is not None
        device, width = tokens.valid.device, tokens.valid.shape[1]
        split = torch.tensor([self.split(unit) for unit in tokens.units], device=device)
        kept, pool, merged = (x[:, None] for x in split.unbind(1))
        scores = tokens.attention.masked_fill(~tokens.valid, float("-inf"))
        ranked = scores.argsort(dim=1, descending=True, stable=True)
        most = max(self.split(unit)[1] for unit in tokens.units)
        if not most:
            return order_selection(ranked, counts)
        step = torch.arange(most, device=device)
        place, real = ranked.gather(1, (kept + step).clamp(max=width - 1)), step < pool  # the pool, best first
        hidden = tokens.hidden.gather(1, place[..., None].expand(-1, -1, tokens.hidden.shape[2])).float()
        order, group = density_peaks(hidden, real, merged)
        first = torch.arange(ranked.shape[1], device=device)
        # kept tokens first, then centres: the entries that `counts` reaches
        centre = place.gather(1, order.gather(1, (first - kept).clamp(0, most - 1)))
        selection = order_selection(torch.where(first < kept, ranked, centre), counts)
        member = torch.zeros(len(place), width, width, device=device)
        ones = (real & (group >= 0)).float()
        member[torch.arange(len(place), device=device)[:, None], place.gather(1, group.clamp(min=0)), place] = ones
        mean = member / member.sum(2, keepdim=True).clamp(min=1)
        alone = torch.eye(width, device=device) * (member.sum(2, keepdim=True) == 0)
        rows = selection.index[..., None].expand(-1, -1, width)
        return Selection(selection.index, selection.valid, (mean + alone).gather(1, rows))


def matching_words(
    visual: torch.Tensor, visual_valid: torch.Tensor, text: torch.Tensor, text_valid: torch.Tensor
) -> torch.Tensor:
    """bool [U, Q]: text tokens to which visual tokens, each handing out one vote by softmax, give more than the mean.

    All tokens where none gets more than the mean.

    Args:
        visual: embeddings [U, N, D]; text: [U, Q, D]; the others: which of them count.
    """
    likeness = (visual.float() @ text.float().transpose(1, 2)).masked_fill(~text_valid[:, None], float("-inf"))
    votes = likeness.softmax(-1).nan_to_num(0.0).masked_fill(~visual_valid[..., None], 0.0).sum(1)
    mean = votes.sum(1, keepdim=True) / text_valid.sum(1, keepdim=True).clamp(min=1)
    above = (votes > mean) & text_valid
    return torch.where(above.any(1, keepdim=True), above, text_valid)


def density_peaks(points: torch.Tensor, real: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Density-peaks clustering (Rodriguez and Laio, 2014) as the released code has it; runs without waiting.

    Density is exp(-mean squared distance to the `groups` nearest, itself included), distances are over sqrt(D); centres
    have the largest density times distance to the nearest denser point. Ties go to the earlier point.

    Args:
        points: float32 [U, M, D]; real: bool [U, M], a run from the left; groups: int64 [U, 1].

    Returns:
        int64 [U, M]: points in falling order of fitness as a centre; and the centre each belongs to.
    """
    apart = torch.cdist(points, points) / points.shape[2] ** 0.5
    both = real[:, :, None] & real[:, None]
    place = torch.arange(points.shape[1], device=points.device)
    near = apart.masked_fill(~both, float("inf")).sort(dim=2).values
    near = near.masked_fill((place >= groups)[:, None] | ~real[..., None], 0.0)
    density = torch.exp(-near.square().sum(2) / groups.clamp(min=1))
    denser = (density[:, None] > density[..., None]) | (
        (density[:, None] == density[..., None]) & (place < place[:, None])
    )
    farthest = apart.masked_fill(~both, 0.0).amax((1, 2))[:, None]
    lead = apart.masked_fill(~(denser & both), float("inf")).amin(2)
    fitness = density * torch.where(lead.isinf(), farthest, lead)
    order = fitness.masked_fill(~real, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    centre = (rank < groups) & real
    group = apart.masked_fill(~centre[:, None], float("inf")).argmin(2)
    return order, torch.where(centre, place, group)
