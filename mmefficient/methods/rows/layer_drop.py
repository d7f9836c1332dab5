"""YOPO's layer dropping (Zhang et al., 2024): late layers do not read visual tokens, but attend to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.errors import PlanError
from mmefficient.points import RowPolicy, VisualWork, about


@dataclass(frozen=True)
class LayerDrop(RowPolicy):
    """From a layer on visual rows give keys alone: what attention gives them is lost, and is not shared out anew.

    `exit` is the other reading: there the tokens leave, and the rest of the softmax sums to one.
    """

    name: ClassVar[str] = "layer_drop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.06169"
    summary: ClassVar[str] = "late layers attend to visual tokens, but read nothing there (YOPO; trained)"

    from_layer: int = field(metadata=about("first decoder layer that reads nothing from visual tokens"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_layer < 0:
            raise PlanError(f"layer_drop: from_layer={self.from_layer} is not a layer number; count from 0.")

    def acts(self, layer: int) -> bool:
        return layer >= self.from_layer

    @property
    def last(self) -> int:
        return self.from_layer

    def work(self, layer: int) -> VisualWork:
        return VisualWork("nothing", ffn=0.0, values=False)
