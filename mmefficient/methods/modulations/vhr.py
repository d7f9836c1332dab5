"""VHR (He et al., ACL 2025): reinforce the heads whose output changes most when the image is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.points import about


@dataclass(frozen=True)
class VHR(Modulation):
    """Heads above the median of the vision-aware head divergence count `alpha` times, in every row."""

    name: ClassVar[str] = "vhr"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"
    summary: ClassVar[str] = "double the heads whose output depends most on the image"
    changes: ClassVar[frozenset[str]] = frozenset({"gain"})
    rows: ClassVar[Rows] = "all"
    needs: ClassVar[frozenset[str]] = frozenset({"blind"})

    alpha: float = field(default=2.0, metadata=about("factor on the chosen heads"))
    deep: float = field(
        default=0.4375, metadata=about("share of the decoder's layers, counted from the end, it acts in")
    )
    second: bool = field(default=True, metadata=about("whether it also acts in the second layer"))
    only: tuple[int, ...] = field(default=(), metadata=about("the layers it acts in, instead of those", quiet=True))
    outliers: bool = field(
        default=True, metadata=about("leave out heads that become active because the image is missing", quiet=True)
    )
    both: bool = field(
        default=True, metadata=about("also reinforce the prompt without image, which later layers compare", quiet=True)
    )

    def layers(self, count: int) -> Sequence[int]:
        if self.only:
            return sorted(set(self.only))
        deep = range(count - round(self.deep * count), count)
        return [1, *deep] if self.second and count > 1 and 1 not in deep else deep

    def change(self, prompt: LayerPrompt) -> Change:
        assert prompt.heads is not None
        assert prompt.blind is not None
        chosen = self.chosen(prompt.heads, prompt.blind) & prompt.has_image[:, None]
        gain = torch.where(chosen, self.alpha, 1.0)
        return Change(gain=gain, blind_too=self.both)

    def chosen(self, seeing: torch.Tensor, blind: torch.Tensor) -> torch.Tensor:
        """bool [B, Hq]: the heads above the median divergence (equations 4 to 7); head outputs are [B, Hq, d]."""
        divergence, activity = divergence_of(seeing, blind), blind.square().sum(-1)
        if self.outliers:
            divergence = divergence.masked_fill(_high(divergence) & _high(activity), 0.0)
        # the median of an even number of heads is the mean of the middle two
        return divergence > divergence.quantile(0.5, dim=1, keepdim=True)


def divergence_of(seeing: torch.Tensor, blind: torch.Tensor) -> torch.Tensor:
    """Vision-aware head divergence [B, Hq]: Euclidean distance of head outputs [B, Hq, d] with and without image."""
    return torch.linalg.vector_norm(seeing - blind, dim=-1)


def _high(x: torch.Tensor) -> torch.Tensor:
    """Above mean + standard deviation (of the heads of a layer as a population)."""
    return x > x.mean(1, keepdim=True) + x.std(1, keepdim=True, correction=0)
