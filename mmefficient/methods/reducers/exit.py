"""Visual token withdrawal (Lin et al., AAAI 2025): all visual tokens leave at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.points import Reducer, Scope, Selection, Unit, VisualTokens, about


@dataclass(frozen=True)
class Exit(Reducer):
    """From `layer` on, text alone is computed and cached."""

    name: ClassVar[str] = "exit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.05803"
    summary: ClassVar[str] = "all visual tokens leave at the input of a layer (VTW)"
    scope: ClassVar[Scope] = "prompt"

    layer: int = field(metadata=about("decoder layer at whose input every visual token leaves"))

    def budget(self, unit: Unit) -> int:
        return 0

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        nothing = torch.empty(len(tokens.units), 0, dtype=torch.long, device=tokens.valid.device)
        return Selection(nothing, nothing.bool())
