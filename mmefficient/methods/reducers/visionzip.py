"""VisionZip (Yang et al., CVPR 2025): dominant patches by CLS attention, the rest merged into contextual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from mmefficient.errors import BudgetError
from mmefficient.points import (
    Positions,
    Reducer,
    Scope,
    Selection,
    Unit,
    VisualTokens,
    about,
    check_budget,
    order_selection,
    resolve_budget,
)  # fmt: skip


@dataclass(frozen=True)
class VisionZip(Reducer):
    """Acts on tower features, per crop, before the projector (the released rule, but the class token is not kept)."""

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    summary: ClassVar[str] = "keep the patches the CLS token looks at, merge the rest into a few contextual tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    shared_by: ClassVar[Scope] = "tile"
    class_token: ClassVar[str] = "attention from all patches of that layer"
    space: ClassVar[Literal["lm", "tower"]] = "tower"

    dominant: float | int = field(
        default=54, metadata=about("patches kept as they are, per crop: a fraction in (0, 1] or a count")
    )
    contextual: float | int = field(default=10, metadata=about("tokens the other patches are merged into, per crop"))
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget("visionzip: dominant", self.dominant)
        check_budget("visionzip: contextual", self.contextual, least=0)

    def split(self, unit: Unit) -> tuple[int, int]:
        """Dominant and contextual tokens of a crop."""
        dominant = resolve_budget(self.dominant, unit)
        contextual = resolve_budget(self.contextual, unit)
        if dominant + contextual > unit.count:
            raise BudgetError(
                f"row {unit.row} has {unit.count} visual tokens in {unit.label}, fewer than the "
                f"{dominant} dominant and {contextual} contextual tokens to be kept."
            )
        return dominant, contextual

    def budget(self, unit: Unit) -> int:
        return sum(self.split(unit))

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.tower is not None
        device, width = tokens.valid.device, tokens.valid.shape[1]
        split = torch.tensor([self.split(unit) for unit in tokens.units], device=device)
        held = torch.tensor([unit.count for unit in tokens.units], device=device)[:, None]
        dominant, contextual = split[:, :1], split[:, 1:]
        place = torch.arange(width, device=device)
        by_attention = tokens.tower.attention.masked_fill(~tokens.valid, float("-inf"))
        rank = by_attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        is_dominant = (rank < dominant) & tokens.valid
        rest = tokens.valid & ~is_dominant
        # targets: every `step`-th of the remaining patches, in raster order, the first `contextual` of them
        nth = rest.long().cumsum(1) - 1
        step = ((held - dominant) // contextual.clamp(min=1)).clamp(min=1)
        is_target = rest & (nth % step == 0) & (nth // step < contextual)
        kept = is_dominant | is_target
        ranked = torch.where(kept, place, place + width).argsort(dim=1)
        selection = order_selection(ranked, counts)
        keys = F.normalize(tokens.tower.keys.float(), dim=-1)
        likeness = (keys @ keys.transpose(1, 2)).masked_fill(~is_target[:, None], float("-inf"))
        nearest = likeness.argmax(dim=2)  # [U, N], the target each patch is closest to
        merged = rest & ~is_target & (contextual > 0)
        belongs = F.one_hot(nearest, width).transpose(1, 2) * merged[:, None]  # [U, target, patch]
        mean = belongs / belongs.sum(-1, keepdim=True).clamp(min=1)
        mix = mean + torch.eye(width, device=device)
        chosen = selection.index[..., None].expand(-1, -1, width)
        return Selection(selection.index, selection.valid, mix.gather(1, chosen))
