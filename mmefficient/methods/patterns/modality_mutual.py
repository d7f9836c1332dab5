"""AKI's modality-mutual attention (Wang et al., 2025): visual tokens see the question that follows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.pattern import image_sees_question
from mmefficient.points import Layers, Pattern, about


@dataclass(frozen=True)
class ModalityMutual(Pattern):
    """Causal, and every visual row sees all text of the prompt; it never sees the answer, which comes later."""

    name: ClassVar[str] = "modality_mutual"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02597"
    many_turns: ClassVar[bool] = False
    summary: ClassVar[str] = "visual tokens also see the question after them (AKI; for accuracy, not speed)"

    layers: Layers = field(default="all", metadata=about("decoder layers: 'all' or such as (8, 9)", quiet=True))

    def pairs(self) -> Pairs:
        return image_sees_question()
