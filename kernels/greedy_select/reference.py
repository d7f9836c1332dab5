"""`greedy_select` in plain torch: the specification every faster version is tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch

NOTHING = 1e-6
"""Share of the largest diagonal entry below which an item's remaining volume counts as 0."""


def first_scores(pairs: torch.Tensor, valid: torch.Tensor, objective: str, weight: torch.Tensor | None) -> torch.Tensor:
    """float32 [U, N]: scores of the first pick ("max_min"), weights ("coverage"), or what counts as volume."""
    if objective == "coverage":
        return torch.ones_like(valid, dtype=torch.float32) if weight is None else weight.float()
    own = pairs.diagonal(dim1=1, dim2=2)
    if objective == "volume":
        return (own.masked_fill(~valid, 0.0).amax(1, keepdim=True) * NOTHING).expand_as(own).float()
    others = pairs.masked_fill(~valid[:, None], float("inf"))
    return torch.diagonal_scatter(others, torch.full_like(own, float("inf")), 0, 1, 2).amin(2)


def greedy_select(
    pairs: torch.Tensor, valid: torch.Tensor, first: torch.Tensor, steps: int, objective: str
) -> torch.Tensor:
    """See the public function; `first` is what `first_scores` gives."""
    return RULES[objective](pairs, valid, first, steps)


def _row(pairs: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
    """pairs [U, N, N], pick [U, 1] -> [U, N]."""
    return pairs.gather(1, pick[..., None].expand(-1, -1, pairs.shape[2]))[:, 0]


def _best(score: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """int64 [U, 1]: the earliest of the highest scores."""
    return score.masked_fill(~left, float("-inf")).argmax(1, keepdim=True)


def _max_min(pairs: torch.Tensor, left: torch.Tensor, reach: torch.Tensor, steps: int) -> torch.Tensor:
    order = []
    for step in range(steps):
        pick = _best(reach, left)
        order.append(pick)
        left = left.scatter(1, pick, False)
        row = _row(pairs, pick)
        # from the second pick on `reach` is the distance to the nearest item picked so far
        reach = row if step == 0 else torch.minimum(reach, row)
    return torch.cat(order, 1)


def _coverage(pairs: torch.Tensor, valid: torch.Tensor, weight: torch.Tensor, steps: int) -> torch.Tensor:
    covered = torch.where(valid, 0.0, float("inf"))  # what is not there needs no cover
    left, order = valid, []
    for _ in range(steps):
        pick = _best((pairs - covered[..., None]).clamp(min=0).sum(1) * weight, left)
        order.append(pick)
        left = left.scatter(1, pick, False)
        covered = torch.maximum(covered, _row(pairs, pick))
    return torch.cat(order, 1)


def _volume(pairs: torch.Tensor, left: torch.Tensor, nothing: torch.Tensor, steps: int) -> torch.Tensor:
    remaining = pairs.diagonal(dim1=1, dim2=2).float()
    factor = pairs.new_zeros(pairs.shape[0], steps, pairs.shape[2])
    order = []
    for step in range(steps):
        volume = torch.where(remaining > nothing, remaining, 0.0)
        pick = _best(volume, left)
        order.append(pick)
        left = left.scatter(1, pick, False)
        own = volume.gather(1, pick)
        earlier = factor[:, :step]
        known = (earlier.gather(2, pick[:, None].expand(-1, step, -1)) * earlier).sum(1)
        new = torch.where(own > 0, (_row(pairs, pick) - known) / torch.where(own > 0, own, 1.0).sqrt(), 0.0)
        factor[:, step] = new
        remaining = remaining - new * new
    return torch.cat(order, 1)


RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "max_min": _max_min,
    "coverage": _coverage,
    "volume": _volume,
}
