"""DivPrune (Alvar et al., CVPR 2025): keep visual tokens that are as different from each other as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.points import Positions, Reducer, Selection, VisualTokens, about, order_selection


@dataclass(frozen=True)
class DivPrune(Reducer):
    """Greedy max-min selection by cosine distance of the language model's input embeddings."""

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    summary: ClassVar[str] = "keep tokens that are as different from each other as possible"

    keep: float | int = field(
        default=0.098, metadata=about("visual tokens that stay, per image: a fraction in (0, 1] or a count")
    )
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        hidden = F.normalize(tokens.hidden.float(), dim=-1)
        distance = 1 - hidden @ hidden.transpose(1, 2)  # [U, N, N]
        return order_selection(max_min_order(distance, tokens.valid, max(counts)), counts)


def max_min_order(distance: torch.Tensor, valid: torch.Tensor, steps: int) -> torch.Tensor:
    """The first `steps` picks of every unit: most isolated first, then always the one farthest from all picked.

    Runs on the device, all units at once, without waiting for it. Ties go to the earlier token. A unit with fewer than
    `steps` tokens gives arbitrary picks once it has none left.

    Args:
        distance: float [U, N, N], symmetric; valid: bool [U, N].

    Returns:
        int64 [U, steps].
    """
    apart = distance.masked_fill(~valid[:, None], float("inf"))
    nearest = apart.masked_fill(torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device), float("inf"))
    reach = nearest.amin(2).masked_fill(~valid, float("-inf"))  # distance to the nearest other token
    order = []
    for step in range(steps):
        pick = reach.argmax(1, keepdim=True)
        order.append(pick)
        valid = valid.scatter(1, pick, False)
        row = distance.gather(1, pick[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        # from the second pick on `reach` is the distance to the nearest token picked so far
        reach = (row if step == 0 else torch.minimum(reach, row)).masked_fill(~valid, float("-inf"))
    return torch.cat(order, 1)
