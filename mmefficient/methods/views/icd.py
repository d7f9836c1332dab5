"""ICD (Wang et al., ACL Findings 2024): what a confused reader of the prompt also makes likely is taken off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.methods.views.vcd import check_share, plausible
from mmefficient.points import about
from mmefficient.view import View

ROLE = "You are a confused objects detector to provide a fuzzy overview or impression of the image."


@dataclass(frozen=True)
class ICD(View):
    """Logits (1 + alpha) l - alpha l', l' after a role that disturbs, among tokens at least `beta` of the best."""

    name: ClassVar[str] = "icd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.18715"
    summary: ClassVar[str] = "contrast the prompt with one under a disturbing role (two forwards per token)"

    alpha: float = field(default=1.0, metadata=about("weight of the contrast"))
    beta: float = field(default=0.1, metadata=about("least probability of a token, as a share of the likeliest's"))
    role: str = field(default=ROLE, metadata=about("text that the second stream reads first", quiet=True, prose=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, self.beta)

    @property
    def words(self) -> str:
        return self.role

    def combine(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * own - self.alpha * other, own, self.beta)
