"""DoLa (Chuang et al., ICLR 2024): what a shallow layer already says is taken off what the last one says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from mmefficient.errors import PlanError
from mmefficient.methods.views.vcd import check_share, plausible
from mmefficient.points import about
from mmefficient.view import View


@dataclass(frozen=True)
class DoLa(View):
    """log p - log p', p' from the candidate layer that differs most, among tokens at least `beta` of the best."""

    name: ClassVar[str] = "dola"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.03883"
    summary: ClassVar[str] = "contrast the last layer with the shallower one that differs most (one forward per token)"

    early: Literal["low", "high"] | tuple[int, ...] = field(
        default="low", metadata=about("candidate layers: every other one of the 'low' or 'high' half, or their numbers")
    )
    beta: float = field(default=0.1, metadata=about("least probability of a token, as a share of the likeliest's"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, self.beta)
        if not self.early:
            raise PlanError("dola: early=() holds no layers such as (2, 4).")

    def depths(self, layers: int) -> Sequence[int]:
        if isinstance(self.early, tuple):
            return self.early
        half = layers // 2
        return range(0, half, 2) if self.early == "low" else range(half + half % 2, layers, 2)

    def combine(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        last, early = own.log_softmax(-1), other.log_softmax(-1)
        most = divergence(last, early).argmax(0)  # [B, n]
        chosen = early.gather(0, most[None, ..., None].expand(1, -1, -1, early.shape[-1]))[0]
        return plausible(last - chosen, own, self.beta)


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence [...] of log-probabilities [..., V]."""
    middle = torch.logaddexp(one, other) - math.log(2)
    return ((one.exp() * (one - middle)).sum(-1) + (other.exp() * (other - middle)).sum(-1)) / 2
