"""PAI (Liu et al., ECCV 2024): the last row's logits on visual tokens rise by a share of their size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.points import about


@dataclass(frozen=True)
class PAI(Modulation):
    """s <- s + alpha * |s| for visual keys, in the row that predicts a token, all heads."""

    name: ClassVar[str] = "pai"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.21771"
    summary: ClassVar[str] = "raise the attention logits of visual tokens by a share of their magnitude"
    changes: ClassVar[frozenset[str]] = frozenset({"map"})
    rows: ClassVar[Rows] = "last"
    groups: ClassVar[int] = 2

    alpha: float = field(default=0.2, metadata=about("share of a logit's magnitude that is added to it"))
    first: int = field(default=2, metadata=about("first decoder layer that is changed"))
    last: int = field(
        default=-1, metadata=about("last decoder layer that is changed; -1 = the model's last", quiet=True)
    )

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        return prompt.tokens.visual

    def change(self, prompt: LayerPrompt) -> Change:
        return Change(logit_map=maps(prompt, (1.0, 0.0), (1.0, self.alpha)))


def maps(prompt: LayerPrompt, *groups: tuple[float, float]) -> torch.Tensor:
    """A logit map [3, 1, Hq, groups] that is the same for all heads: for every group the factors of s and of |s|."""
    factors = torch.tensor([[a for a, _ in groups], [b for _, b in groups], [0.0] * len(groups)])
    return factors[:, None, None].expand(-1, -1, prompt.query.shape[1], -1).contiguous().to(prompt.query.device)
