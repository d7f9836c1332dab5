"""Shared by methods that keep what stands out: how much that is, and one token for all the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmefficient.points import Reducer, Selection, VisualTokens, order_selection


class StandsOut(Reducer):
    """A reducer whose field `keep` may be None, as many as stand out: its `choose` serves that, and budgets."""

    keep: float | int | None

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        return self.keep is None

    def reduce(self, tokens: VisualTokens, counts: Sequence[int]) -> Selection:
        return self.choose(tokens)[0]


def outliers(scores: torch.Tensor, tokens: VisualTokens) -> list[int]:
    """How many scores [U, N] of a unit exceed its third quartile by 1.5 interquartile ranges; waits for the device."""
    counts = []
    for row, unit in zip(scores.float(), tokens.units, strict=True):
        held = row[: unit.count]
        low, high = torch.quantile(held, torch.tensor([0.25, 0.75], device=held.device))
        counts.append((held > high + 1.5 * (high - low)).sum())
    return torch.stack(counts).tolist()


def without_rest(counts: Sequence[int], tokens: VisualTokens) -> list[int]:
    """Of `counts` tokens of every unit, how many are patches: one is for the rest, if there is any and room for it."""
    return [
        count if count == unit.count else max(1, count - 1) for count, unit in zip(counts, tokens.units, strict=True)
    ]


def with_rest(
    kept: torch.Tensor, tokens: VisualTokens, counts: Sequence[int], mix: torch.Tensor, rest: torch.Tensor
) -> Selection:
    """Keep `kept`, and put one token for all others at the last place that is not kept.

    Args:
        kept: bool [U, N], as many as `without_rest` of every unit.
        mix: [U, N, N], what each kept token is mixed from.
        rest: [U, N], with what weight the others enter their token.
    """
    width = kept.shape[1]
    place = torch.arange(width, device=kept.device)
    others = tokens.valid & ~kept
    room = kept.sum(1, keepdim=True) < torch.tensor(counts, device=kept.device)[:, None]
    home = place.masked_fill(~(others & room), -1).amax(1, keepdim=True)  # -1: there is no such token
    chosen = kept | (place == home)
    selection = order_selection(torch.where(chosen, place, place + width).argsort(dim=1), counts)
    at = selection.index[..., None].expand(-1, -1, width)
    summary = (rest * others)[:, None]
    return Selection(
        selection.index,
        selection.valid,
        torch.where((selection.index == home)[..., None], summary, mix.gather(1, at)),
    )
