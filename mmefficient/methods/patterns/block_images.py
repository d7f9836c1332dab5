"""BlockRank's layout for pictures (Gupta et al., 2025): pages do not see each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.pattern import pages_apart
from mmefficient.points import Layers, Pattern, about


@dataclass(frozen=True)
class BlockImages(Pattern):
    """Causal, but visual rows of one view (image, overview, frame) do not see visual tokens of another."""

    name: ClassVar[str] = "block_images"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.05396"
    summary: ClassVar[str] = "the visual tokens of one image or frame do not attend to those of another"

    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def pairs(self) -> Pairs:
        return pages_apart()
