"""PyramidDrop (Xing et al., CVPR 2025): visual tokens leave in stages, ranked by the last prompt row in each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.points import SHARED, Reducer, Scope, Unit, VisualTokens, about, at_depths, check_budget
from mmefficient.profiles import Checkpoint

DEPTHS = (8 / 32, 16 / 32, 24 / 32)  # published for 32 layers


def check_shares(name: str, shares: Sequence[float], stages: int) -> None:
    """Raises BudgetError or PlanError unless `shares` are one falling share of the prompt's tokens per stage."""
    if len(shares) != stages or sorted(shares, reverse=True) != list(shares):
        raise PlanError(f"{name}: shares={tuple(shares)} are not {stages} shares that fall from stage to stage.")
    for share in shares:
        check_budget(f"{name}: shares", float(share))


def part(share: float, unit: Unit) -> int:
    """Tokens that a share of the prompt's tokens leaves of `unit`: rounded, at least 1, no more than it holds."""
    return min(unit.count, max(1, int(share * unit.total + 0.5)))


@dataclass(frozen=True)
class PyramidDrop(Reducer):
    """Three stages; each scores with the layer that follows, from queries and keys computed for that purpose."""

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"
    summary: ClassVar[str] = "drop visual tokens in three stages, by the attention of the last prompt token"
    many_turns: ClassVar[bool] = False

    shares: tuple[float, ...] = field(
        default=(0.5, 0.25, 0.125), metadata=about("visual tokens left after each stage, as shares of those at first")
    )
    layers: tuple[int, ...] = field(
        default=(), metadata=about("decoder layers at whose input they leave; () = quarters of the model", quiet=True)
    )
    scope: Scope = field(default="image", metadata=SHARED)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.name, self.shares, len(DEPTHS))

    def stages(self, checkpoint: Checkpoint) -> tuple[Reducer, ...]:
        layers = at_depths(self.name, self.layers, DEPTHS, checkpoint.layers)
        return tuple(_Stage(layer, share, self.scope) for layer, share in zip(layers, self.shares, strict=True))


@dataclass(frozen=True)
class _Stage(Reducer):
    name: ClassVar[str] = "pyramiddrop"
    needs: ClassVar[frozenset[str]] = frozenset({"own_row_attention"})

    layer: int
    share: float
    scope: Scope = "image"

    def budget(self, unit: Unit) -> int:
        return part(self.share, unit)

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention
