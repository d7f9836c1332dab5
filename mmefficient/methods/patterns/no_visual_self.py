"""NAAViT (Yuan et al., 2025): no attention among visual tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.pattern import no_visual_self_attention
from mmefficient.points import Layers, Pattern, about


@dataclass(frozen=True)
class NoVisualSelf(Pattern):
    """Visual rows do not see each other; what text rows see is unchanged, and the FFN runs on all rows."""

    name: ClassVar[str] = "no_visual_self"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.02458"
    summary: ClassVar[str] = "visual tokens do not attend to each other (NAAViT)"

    scope: Literal["self", "nothing", "text"] = field(
        default="self", metadata=about("what a visual row sees: 'self', 'nothing', or 'text' (before it, and itself)")
    )
    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def pairs(self) -> Pairs:
        return no_visual_self_attention(self.scope)
