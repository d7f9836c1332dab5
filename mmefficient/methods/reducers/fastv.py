"""FastV (Chen et al., ECCV 2024): after a few layers, keep the visual tokens the last prompt row attends to most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from mmefficient.errors import BudgetError, PlanError
from mmefficient.points import SHARED, Method, Reducer, Scope, VisualTokens, about
from mmefficient.profiles import Checkpoint


@dataclass(frozen=True)
class FastV(Reducer):
    """Scores come from layer `layer` - 1: last prompt row, mean over heads (the released code's rule)."""

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    summary: ClassVar[str] = "keep the visual tokens that the last prompt token attends to most in an early layer"
    ignores_hidden: ClassVar[bool] = True
    many_turns: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"last_row_attention"})

    layer: int = field(
        default=2, metadata=about("decoder layer at whose input tokens leave; scores come from the layer before")
    )
    keep: float | int = field(
        default=0.5, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )

    over: Literal["site", "layers"] = field(
        default="site",
        metadata=about("'site': keep holds from the layer on; 'layers': it is the mean over all layers", quiet=True),
    )
    scope: Scope = field(default="image", metadata=SHARED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over == "layers" and not isinstance(self.keep, float):
            raise PlanError("fastv: a mean over layers is a fraction; write keep=0.25, or over=site for a count.")
        if self.layer == 0:
            raise PlanError("fastv: layer=0 has no layer before it to take attention from; use layer >= 1.")

    @property
    def staged(self) -> bool:
        return False

    def stages(self, checkpoint: Checkpoint) -> tuple[Method, ...]:
        if self.over == "site":
            return (self,)
        return (replace(self, keep=share_after(self.keep, self.layer, checkpoint.layers), over="site"),)

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention


def share_after(mean: float, site: int, layers: int) -> float:
    """The share to keep from layer `site` on, for a mean over all `layers` of `mean`.

    Raises:
        BudgetError: the layers before hold more already.
    """
    share = (mean * layers - site) / (layers - site)
    if share <= 0:
        raise BudgetError(
            f"keep={mean} as a mean over {layers} layers is spent before layer {site}; use an earlier one."
        )
    return share
