"""SPIN (EMNLP 2025): heads that look at the image least are turned down, anew for every token."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.kernels.least_heads import least_heads
from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.points import about


@dataclass(frozen=True)
class SPIN(Modulation):
    """All but the top `keep` of the heads by their summed logits on the image count `factor` times, in the last row."""

    name: ClassVar[str] = "spin"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.16411"
    summary: ClassVar[str] = "turn down the heads that look at the image least, token by token"
    changes: ClassVar[frozenset[str]] = frozenset({"gain"})
    rows: ClassVar[Rows] = "last"

    keep: float = field(default=0.95, metadata=about("share of the heads that stay as they are"))
    factor: float = field(default=0.08, metadata=about("factor on the output of the others"))
    first: int = field(default=0, metadata=about("first decoder layer that is changed"))
    last: int = field(
        default=-1, metadata=about("last decoder layer that is changed; -1 = the model's last", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise PlanError(f"spin: keep={self.keep} is outside (0, 1]; it is a share of the heads.")

    def change(self, prompt: LayerPrompt) -> Change:
        # the sum of the logits is the logit of the sum: one stored vector per key head answers every later query
        total = (prompt.key.float() * prompt.tokens.visual[:, None, :, None]).sum(2)
        heads = prompt.query.shape[1]
        low = torch.where(prompt.has_image, self.factor, 1.0)
        return Change(gain=partial(self.gain, total.repeat_interleave(heads // total.shape[1], 1), low))

    def gain(self, total: torch.Tensor, low: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """[B, Hq, R] for queries [B, Hq, R, d]; `total` [B, Hq, d] sums the image's keys, `low` [B] is the factor."""
        heads = query.shape[1]
        return least_heads(query, total, low, heads - int(self.keep * heads))
