"""Smaller pictures for the vision tower: the baseline that many a pruning method loses to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mmefficient.points import Positions, Reducer, Scope, Selection, VisualTokens, about, select_top
from mmefficient.tower import SmallerPictures

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter


@dataclass(frozen=True)
class Downsample(Reducer):
    """The tower's input is scaled down: tower and language model see fewer patches, each of more of the picture."""

    name: ClassVar[str] = "downsample"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07143"
    summary: ClassVar[str] = "give the vision tower a smaller picture (baseline)"
    needs: ClassVar[frozenset[str]] = frozenset({"mark"})
    adaptive: ClassVar[bool] = True
    shared_by: ClassVar[Scope] = "tile"

    keep: float | int = field(
        default=0.25, metadata=about("patches of the smaller picture, per crop: a fraction in (0, 1] or a count")
    )
    positions: Positions = field(
        default="keep", metadata=about("'keep' the position ids, or 'compact' them", quiet=True)
    )

    @property
    def thins(self) -> bool:
        return True

    def attach(self, adapter: Adapter) -> list[Callable[[], Any]]:
        return SmallerPictures(adapter, self.keep).attach()

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        assert tokens.mark is not None
        counts = (tokens.mark & tokens.valid).sum(1).tolist()
        return select_top(tokens.mark, tokens.valid, counts), counts
