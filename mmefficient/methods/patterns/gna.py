"""Generalised neighbourhood attention (Hassani et al., 2025): windows whose places move in strides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.kernels.grouped_attention.pattern import FAR, window
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.points import Layers, Pattern, about
from mmefficient.tokens import TokenMap


@dataclass(frozen=True)
class GNA(Pattern):
    """Of its own view a visual row sees `window` rows and columns around the leader of its group of `stride`.

    Windows are shifted to stay inside the grid, so that tokens at its border see as many others.
    """

    name: ClassVar[str] = "gna"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.16922"
    summary: ClassVar[str] = "visual tokens of a tile share one window of neighbours (GNA)"

    window: int = field(default=7, metadata=about("rows and columns that a visual token sees"))
    stride: int = field(default=1, metadata=about("rows and columns that share a window; 1 = each its own"))
    bidirectional: bool = field(default=False, metadata=about("also see neighbours that come later in the prompt"))
    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.stride <= self.window:
            raise PlanError(f"{self}: give 1 <= stride <= window.")

    def pairs(self) -> Pairs:
        return window(FAR, self.bidirectional)  # the same view; `limit` says the rest

    def limit(self, tokens: TokenMap) -> torch.Tensor:
        page = torch.stack([tokens.image, tokens.view], -1)
        same = (page[:, :, None] == page[:, None]).all(-1) & tokens.visual[:, :, None] & tokens.visual[:, None]
        ok = torch.ones_like(same)
        for place in (tokens.row, tokens.col):
            length = torch.where(same, place[:, None] + 1, 0).amax(-1)  # of the view's axis, for every token
            leader = torch.minimum(place // self.stride * self.stride + self.stride // 2, length - 1)
            first = (leader - self.window // 2).minimum(length - self.window).clamp(min=0)[..., None]
            ok &= (place[:, None] >= first) & (place[:, None] < first + self.window)
        placed = tokens.row >= 0
        return ok | ~same | ~placed[:, :, None] | ~placed[:, None]
