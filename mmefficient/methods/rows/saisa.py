"""SAISA (Yuan et al., 2025): visual rows have no life inside the language model, each layer reads the encoder anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmefficient.points import RowPolicy, VisualWork

PROJECTORS = "layer_projectors"
"""Attribute of the multimodal base model that holds one projector per decoder layer."""


@dataclass(frozen=True)
class Saisa(RowPolicy):
    """In every layer, visual keys and values come from that layer's own projector of the vision tower's features.

    A model without trained projectors uses its one projector in every layer, which is where training starts from.
    """

    name: ClassVar[str] = "saisa"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.02458"
    summary: ClassVar[str] = "visual tokens are keys and values only, projected anew for every layer (SAISA; trained)"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    sources: ClassVar[bool] = True

    def work(self, layer: int) -> VisualWork:
        return VisualWork("nothing", ffn=0.0)

    def source(self, layer: int, base: nn.Module, projector: nn.Module) -> nn.Module:
        trained: nn.ModuleList | None = getattr(base, PROJECTORS, None)
        return projector if trained is None else trained[layer]
