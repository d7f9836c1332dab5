"""VAF (Yin et al., CVPR 2025, "ClearSight"): middle layers scale the logits of visual and of system tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.methods.modulations.pai import maps
from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.points import about
from mmefficient.tokens import Role


@dataclass(frozen=True)
class VAF(Modulation):
    """s <- enhance * s for visual keys and suppress * s for the text before them, in every row after the image."""

    name: ClassVar[str] = "vaf"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.13107"
    summary: ClassVar[str] = "scale the logits of visual tokens up and those of the text before them down"
    changes: ClassVar[frozenset[str]] = frozenset({"map"})
    rows: ClassVar[Rows] = "answer"
    groups: ClassVar[int] = 3

    enhance: float = field(default=1.15, metadata=about("factor on the logits of visual tokens"))
    suppress: float = field(default=0.95, metadata=about("factor on the logits of the text before the image"))
    first: int = field(default=9, metadata=about("first decoder layer that is changed"))
    last: int = field(default=14, metadata=about("last decoder layer that is changed; -1 = the model's last"))

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        system = (prompt.tokens.role == Role.SYSTEM).int()
        return torch.where(prompt.tokens.visual, 2, system)

    def change(self, prompt: LayerPrompt) -> Change:
        return Change(logit_map=maps(prompt, (1.0, 0.0), (self.suppress, 0.0), (self.enhance, 0.0)))
