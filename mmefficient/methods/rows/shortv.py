"""ShortV (Yuan et al., ICCV 2025): visual rows stand still in the layers that change the answer least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.errors import PlanError
from mmefficient.points import Layers, Method, RowPolicy, VisualWork, about
from mmefficient.profiles import Checkpoint


@dataclass(frozen=True)
class ShortV(RowPolicy):
    """In the chosen layers visual rows give keys and values, and nothing else is computed for them."""

    name: ClassVar[str] = "shortv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.00502"
    summary: ClassVar[str] = "visual rows are frozen in chosen layers: text reads them, they do not change (ShortV)"
    counts: ClassVar[bool] = True

    layers: Layers | int = field(
        metadata=about("decoder layers in which visual rows stand still: 'all', such as (8, 9), or how many (profile)")
    )

    def stages(self, checkpoint: Checkpoint) -> tuple[Method, ...]:
        if not isinstance(self.layers, int):
            return (self,)
        order = checkpoint.profile(self.name).facts["order"]
        if self.layers > len(order):
            raise PlanError(f"{self}: the model has {len(order)} layers.")
        return (ShortV(tuple(sorted(order[: self.layers]))),)

    def work(self, layer: int) -> VisualWork:
        return VisualWork("nothing", ffn=0.0)
