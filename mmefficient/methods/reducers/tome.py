"""ToMe (Bolya et al., ICLR 2023): merge the most alike tokens, between the layers of the vision tower or after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from mmefficient.merging import MergingLayers, match
from mmefficient.points import Positions, Reducer, Scope, Selection, VisualTokens, about, order_selection, select_top

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter
    from mmefficient.profiles import Checkpoint


@dataclass(frozen=True)
class ToMe(Reducer):
    """Tokens at even places look for their likest at odd ones; the most alike pairs become one, weighted by size."""

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    summary: ClassVar[str] = "merge the patches that are most alike, inside the vision tower or at its output"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    shared_by: ClassVar[Scope] = "tile"

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay, per crop: a fraction in (0, 1] or a count")
    )
    where: Literal["tower", "output"] = field(
        default="tower", metadata=about("'tower': between its layers, which makes it faster too; 'output': after it")
    )
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )

    @property
    def thins(self) -> bool:
        return self.where == "tower"

    def stages(self, checkpoint: Checkpoint) -> tuple[Reducer, ...]:
        stage = _Inside if self.where == "tower" else _After
        return (stage(self.keep, self.positions),)


@dataclass(frozen=True)
class _Inside(Reducer):
    name: ClassVar[str] = "tome"
    needs: ClassVar[frozenset[str]] = frozenset({"mark"})
    adaptive: ClassVar[bool] = True
    shared_by: ClassVar[Scope] = "tile"

    keep: float | int
    positions: Positions

    def attach(self, adapter: Adapter) -> list[Callable[[], Any]]:
        return MergingLayers(adapter, self.keep).attach()

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        assert tokens.mark is not None
        counts = (tokens.mark & tokens.valid).sum(1).tolist()
        return select_top(tokens.mark, tokens.valid, counts), counts


@dataclass(frozen=True)
class _After(Reducer):
    name: ClassVar[str] = "tome"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    shared_by: ClassVar[Scope] = "tile"
    space: ClassVar[Literal["lm", "tower"]] = "tower"

    keep: float | int
    positions: Positions

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.tower is not None
        units, width = tokens.valid.shape
        mix = torch.zeros(units, width, width, device=tokens.valid.device)
        homes = torch.full((units, width), width, device=tokens.valid.device)
        alike: dict[tuple[int, int], list[int]] = {}  # units that hold and keep the same go together
        for place, (unit, count) in enumerate(zip(tokens.units, counts, strict=True)):
            alike.setdefault((unit.count, count), []).append(place)
        for (held, count), places in alike.items():
            home, share = merge_down(tokens.tower.keys[places, :held].float(), tokens.size[places, :held], count)
            homes[places, :count] = home
            mix[places, :count, :held] = share
        order = homes.argsort(dim=1)
        selection = order_selection(homes.gather(1, order), counts)
        most = max(counts)
        return Selection(selection.index, selection.valid, mix.gather(1, order[:, :most, None].expand(-1, -1, width)))


def merge_down(metric: torch.Tensor, size: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge until `count` tokens are left, at most half of them in a round; what merges takes the mean metric.

    Args:
        metric: float32 [B, N, d]; size: float32 [B, N].

    Returns:
        home, int64 [B, count]: the place that each token keeps; share, float32 [B, count, N]: what it is a mean of.
    """
    batch, held = size.shape
    home = torch.arange(held, device=size.device).expand(batch, -1)
    share = torch.eye(held, device=size.device).expand(batch, -1, -1)
    while held > count:
        merge = match(metric, min(held - count, held // 2))
        metric, share, total = merge(metric, size), merge(share, size), merge.add(size)
        home, size, held = merge.keep(home), total, total.shape[1]
    return home, share
