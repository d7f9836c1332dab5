"""YOPO (Zhang et al., 2024): visual rows attend to neighbours, use half an FFN, and leave halfway."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.methods.patterns.window2d import Window2D
from mmefficient.methods.reducers.exit import Exit
from mmefficient.methods.rows.thin_ffn import ThinFFN
from mmefficient.points import Method, about
from mmefficient.profiles import Checkpoint


@dataclass(frozen=True)
class Yopo(Method):
    """`window2d`, `thin_ffn` and `exit` under one name; without the paper's training, the narrow FFN costs accuracy."""

    name: ClassVar[str] = "yopo"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.06169"
    point: ClassVar[str] = "rows"
    summary: ClassVar[str] = "neighbours only, a narrow FFN and no late layers for visual rows (YOPO; trained)"

    exit: int = field(metadata=about("decoder layer at whose input visual tokens leave"))
    radius: int = field(default=2, metadata=about("rows and columns a visual token sees to each side"))
    ratio: float = field(default=2.0, metadata=about("how many times narrower the FFN is for visual rows"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parts()  # they check their fields

    def _parts(self) -> tuple[Method, ...]:
        return Window2D(self.radius), ThinFFN(self.ratio), Exit(self.exit)

    def stages(self, checkpoint: Checkpoint) -> tuple[Method, ...]:
        return self._parts()
