"""SCOPE (Deng et al., NeurIPS 2025): greedily cover what the patches show, weighted by CLS attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.errors import PlanError
from mmefficient.points import Positions, Reducer, Selection, VisualTokens, about, order_selection
from mmefficient.points import Scope as Sharing


@dataclass(frozen=True)
class Scope(Reducer):
    """A patch is covered as far as its likest kept patch is like it; picks add the most coverage times saliency."""

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    summary: ClassVar[str] = "keep patches that cover the picture, weighted by what the CLS token looks at"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    scope: ClassVar[Sharing] = "tile"

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay, per crop: a fraction in (0, 1] or a count")
    )
    alpha: float = field(default=1.0, metadata=about("power of the attention in the weight; 0 = coverage alone"))
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not self.alpha >= 0:
            raise PlanError(f"scope: alpha={self.alpha} is negative; give 0 or more.")

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.tower is not None
        features = F.normalize(tokens.tower.features.float(), dim=-1)
        both = tokens.valid[:, :, None] & tokens.valid[:, None]
        likeness = (features @ features.transpose(1, 2)).masked_fill(~both, 0.0)
        weight = tokens.tower.attention.masked_fill(~tokens.valid, 0.0) ** self.alpha
        return order_selection(coverage_order(likeness, weight, tokens.valid, max(counts)), counts)


def coverage_order(likeness: torch.Tensor, weight: torch.Tensor, valid: torch.Tensor, steps: int) -> torch.Tensor:
    """The first `steps` picks of every unit: the j with the largest sum_i max(0, likeness_ij - covered_i) * weight_j.

    Runs on the device, all units at once, without waiting for it. Ties go to the earlier patch. A unit with fewer than
    `steps` patches gives arbitrary picks once it has none left.

    Args:
        likeness: float [U, N, N], symmetric, 0 where a patch is not valid; weight: float [U, N], >= 0.
        valid: bool [U, N].

    Returns:
        int64 [U, steps].
    """
    covered = torch.zeros_like(weight)
    order = []
    for _ in range(steps):
        gain = (likeness - covered[..., None]).clamp(min=0).sum(1) * weight
        pick = gain.masked_fill(~valid, float("-inf")).argmax(1, keepdim=True)
        order.append(pick)
        valid = valid.scatter(1, pick, False)
        row = likeness.gather(1, pick[..., None].expand(-1, -1, likeness.shape[2]))[:, 0]
        covered = torch.maximum(covered, row)
    return torch.cat(order, 1)
