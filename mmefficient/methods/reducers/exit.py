"""Visual token withdrawal (Lin et al., AAAI 2025): all visual tokens leave at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from mmefficient.points import Reducer, Scope, Selection, Unit, VisualTokens, about
from mmefficient.profiles import Checkpoint


@dataclass(frozen=True)
class Exit(Reducer):
    """From `layer` on, text alone is computed and cached."""

    name: ClassVar[str] = "exit"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.05803"
    summary: ClassVar[str] = "all visual tokens leave at the input of a layer (VTW)"
    ignores_hidden: ClassVar[bool] = True
    shared_by: ClassVar[Scope] = "prompt"

    layer: int | Literal["auto"] = field(
        metadata=about("decoder layer at whose input every visual token leaves; auto = the checkpoint's profile")
    )

    @property
    def site(self) -> int:
        return 0 if isinstance(self.layer, str) else self.layer  # `stages` knows

    def stages(self, checkpoint: Checkpoint) -> tuple[Reducer, ...]:
        if isinstance(self.layer, int):
            return (self,)
        return (Exit(int(checkpoint.profile(self.name).facts["layer"])),)

    def budget(self, unit: Unit) -> int:
        return 0

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        nothing = torch.empty(len(tokens.units), 0, dtype=torch.long, device=tokens.valid.device)
        return Selection(nothing, nothing.bool())
