"""Lift: VHR (He et al., ACL 2025) without a choice of heads, in the answer's rows alone. An extension of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.points import about


@dataclass(frozen=True)
class Lift(Modulation):
    """The output of every head counts `gain` times, in every row after the image; the image's own rows stay."""

    name: ClassVar[str] = "lift"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"
    summary: ClassVar[str] = (
        "let attention count more beside the feed-forward layers, after the image (ours, after VHR)"
    )
    changes: ClassVar[frozenset[str]] = frozenset({"gain"})
    rows: ClassVar[Rows] = "answer"

    gain: float = field(default=1.3, metadata=about("factor on the output of every head"))
    first: int = field(default=0, metadata=about("first decoder layer that is changed", quiet=True))
    last: int = field(
        default=-1, metadata=about("last decoder layer that is changed; -1 = the model's last", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gain > 0:
            raise PlanError(f"lift: gain={self.gain} is not above 0; it is a factor.")

    def change(self, prompt: LayerPrompt) -> Change:
        gain = torch.where(prompt.has_image, self.gain, 1.0)[:, None]
        return Change(gain=gain.repeat(1, prompt.query.shape[1]))
