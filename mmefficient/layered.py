"""Methods within chosen decoder layers: what visual rows compute there, and which pairs of attention exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from mmefficient.errors import PlanError
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.method import Method

if TYPE_CHECKING:
    from mmefficient.tokens import TokenMap

Layers = Literal["all"] | tuple[int, ...]


@dataclass(frozen=True)
class VisualWork:
    """What one layer computes for the rows of visual tokens; their keys it computes in any case.

    Attributes:
        attention: "full" = like every row; "self" = each attends to itself with weight 1, so that no query is needed
            and the update is W_O W_V LN(x); "nothing" = no update by attention.
        ffn: share of the FFN's inner width that they pass through: 1 = all, 0 = no FFN.
        extra: multiply-accumulates per row that a method adds.
        values: whether they give values; without, who sees their keys reads zeros there.
    """

    attention: Literal["full", "self", "nothing"] = "full"
    ffn: float = 1.0
    extra: int = 0
    values: bool = True

    def __and__(self, other: VisualWork) -> VisualWork:
        """The less of both."""
        order = ("nothing", "self", "full")
        least = min(self.attention, other.attention, key=order.index)
        extra, values = self.extra + other.extra, self.values and other.values
        return VisualWork(least, min(self.ffn, other.ffn), extra, values)


EVERYTHING = VisualWork()


@dataclass(frozen=True)
class LayerMethod(Method):
    """A method that acts within chosen decoder layers: its field `layers: Layers` is "all" or a tuple of numbers."""

    counts: ClassVar[bool] = False
    """Whether `layers` may also be a number of layers, which `stages` resolves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers: Any = getattr(self, "layers", "all")
        if layers == "all" or (self.counts and isinstance(layers, int) and layers > 0):
            return
        if not isinstance(layers, tuple) or not layers or min(layers) < 0 or len(set(layers)) < len(layers):
            raise PlanError(
                f"{self.name}: layers={layers!r} is neither 'all' nor a tuple of layers such as (8, 9, 10)."
            )

    def acts(self, layer: int) -> bool:
        """Whether `layer` is one of the chosen."""
        layers: Layers = getattr(self, "layers", "all")
        return layers == "all" or layer in layers

    @property
    def last(self) -> int:
        """The highest layer that is named; -1 = none is."""
        layers: Layers = getattr(self, "layers", "all")
        return -1 if layers == "all" else max(layers)


@dataclass(frozen=True)
class RowPolicy(LayerMethod):
    """What is computed for visual rows. Identity: everything."""

    point: ClassVar[str] = "rows"
    sources: ClassVar[bool] = False
    """Whether visual rows enter each layer anew, from `source`."""

    def work(self, layer: int) -> VisualWork:
        """Of a layer that the method acts in."""
        raise NotImplementedError(f"{type(self).__name__} does not override work")

    def source(self, layer: int, base: nn.Module, projector: nn.Module) -> nn.Module:
        """What maps the projector's input [M, Dv] to the visual rows [M, D] that enter `layer`.

        Args:
            base: the multimodal model without a head; projector: its own.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override source")


@dataclass(frozen=True)
class Pattern(LayerMethod):
    """Which query-key pairs exist while a prompt is read. Identity: causal. Patterns in one layer intersect."""

    point: ClassVar[str] = "pattern"

    def pairs(self) -> Pairs:
        """The pairs in a layer that the method acts in."""
        raise NotImplementedError(f"{type(self).__name__} does not override pairs")

    def limit(self, tokens: TokenMap) -> torch.Tensor:
        """What is left of these pairs by a rule that no `Pairs` can say, bool [B, n, n] of which rows of visual tokens
        count. Costs memory by the square; identity: everything.

        Args:
            tokens: the n slots that the layer holds.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override limit")

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: TokenMap, scale: float
    ) -> torch.Tensor:
        """The attention itself, for a method that no pairs describe: [B, H, n, d].

        Args:
            query, key, value: [B, H, n, d] and [B, G, n, d] twice, rotated; tokens: the n slots; scale: on the logits.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override attend")
