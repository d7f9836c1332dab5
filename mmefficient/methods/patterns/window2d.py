"""YOPO's neighbourhood attention (Zhang et al., 2024): a visual token sees what is near it in the picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.errors import PlanError
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.pattern import window
from mmefficient.points import Layers, Pattern, about


@dataclass(frozen=True)
class Window2D(Pattern):
    """Of its own view a visual row sees a square of (2 * radius + 1)^2 tokens, besides the text before it."""

    name: ClassVar[str] = "window2d"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.06169"
    summary: ClassVar[str] = "a visual token attends to its neighbours in the picture and to the text before it (YOPO)"

    radius: int = field(default=2, metadata=about("rows and columns a visual token sees to each side"))
    bidirectional: bool = field(default=True, metadata=about("also see neighbours that come later in the prompt"))
    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius < 0:
            raise PlanError(f"{self}: radius counts rows and columns from 0.")

    def pairs(self) -> Pairs:
        return window(self.radius, self.bidirectional)
