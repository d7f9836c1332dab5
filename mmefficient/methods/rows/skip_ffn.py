"""Visual rows skip the FFN of chosen layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.points import Layers, RowPolicy, VisualWork, about


@dataclass(frozen=True)
class SkipFFN(RowPolicy):
    """Attention as ever; in the chosen layers the FFN runs on text rows alone."""

    name: ClassVar[str] = "skip_ffn"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.02458"
    summary: ClassVar[str] = "visual rows skip the FFN of chosen layers"

    layers: Layers = field(metadata=about("decoder layers whose FFN visual rows skip: 'all' or such as (8, 9)"))

    def work(self, layer: int) -> VisualWork:
        return VisualWork(ffn=0.0)
