"""YOPO's narrow FFN (Zhang et al., 2024): visual rows use only the first part of each FFN's inner width."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.errors import PlanError
from mmefficient.points import Layers, RowPolicy, VisualWork, about


@dataclass(frozen=True)
class ThinFFN(RowPolicy):
    """The neurons that stay are the first by index, as in the released code: without fine-tuning they are arbitrary."""

    name: ClassVar[str] = "thin_ffn"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.06169"
    summary: ClassVar[str] = "visual rows use the first part of the FFN's inner width only (YOPO)"

    ratio: float = field(default=2.0, metadata=about("how many times narrower the FFN is for visual rows"))
    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 1:
            raise PlanError(
                f"thin_ffn: ratio={self.ratio!r} does not narrow the FFN; give a number above 1, such as 2."
            )

    def work(self, layer: int) -> VisualWork:
        return VisualWork(ffn=1 / self.ratio)
