"""CDPruner (Zhang et al., NeurIPS 2025): a determinantal point process, conditioned on the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.kernels.greedy_select import greedy_select
from mmefficient.likeness import cosines
from mmefficient.points import (
    SHARED,
    Positions,
    Reducer,
    Scope,
    Selection,
    VisualTokens,
    about,
    order_selection,
)


@dataclass(frozen=True)
class CDPruner(Reducer):
    """Kept patches span as much volume as greedy choice can make them, in lengths that grow with their relevance."""

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"
    summary: ClassVar[str] = "keep patches that are different from each other and relevant to the question (DPP)"
    many_turns: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"match"})

    keep: float | int = field(
        default=0.25, metadata=about("visual tokens that stay of each unit of scope: a fraction in (0, 1] or a count")
    )
    matcher: str = field(
        default="openai/clip-vit-large-patch14-336",
        metadata=about("what compares patches with the question: see docs/matchers.md"),
    )
    positions: Positions = field(
        default="compact", metadata=about("'compact' the position ids, or 'keep' them", quiet=True)
    )
    scope: Scope = field(default="tile", metadata=SHARED)

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        assert tokens.match is not None
        length = spread_by_row(tokens.match.relevance(), tokens)
        kernel = length[:, :, None] * cosines(tokens.hidden) * length[:, None]
        return order_selection(greedy_select(kernel, tokens.valid, max(counts), objective="volume"), counts)


def spread_by_row(values: torch.Tensor, tokens: VisualTokens) -> torch.Tensor:
    """`values` [U, N] stretched to (0, 1], all units of a batch row together."""
    rows = torch.tensor([unit.row for unit in tokens.units], device=values.device)
    ends = []
    for how, beyond in (("amin", float("inf")), ("amax", float("-inf"))):
        per_unit = getattr(values.masked_fill(~tokens.valid, beyond), how)(1)
        per_row = torch.full((max(unit.row for unit in tokens.units) + 1,), beyond, device=values.device)
        ends.append(per_row.scatter_reduce_(0, rows, per_unit, how)[rows, None])
    low, high = ends
    stretched = (values - low + 1e-6) / (high - low)
    return stretched.masked_fill(high <= low, 1.0).masked_fill(~tokens.valid, 0.0)
