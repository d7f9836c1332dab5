"""EE-MLLM's composite attention (Ma et al., 2024): visual rows ask nothing, the layer's own weights carry them on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.pattern import no_visual_self_attention
from mmefficient.points import Layers, Pattern, about


@dataclass(frozen=True)
class Composite(Pattern):
    """A visual row x becomes x + W_O W_V LN(x), then the FFN: attention to itself with weight 1, without a query."""

    name: ClassVar[str] = "composite"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.11795"
    summary: ClassVar[str] = "text attends to everything, visual tokens only pass through V, O and the FFN (EE-MLLM)"

    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def pairs(self) -> Pairs:
        return no_visual_self_attention("self")
