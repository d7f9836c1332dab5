"""Decoder layers of which only some rows are wanted: keys and values of all, and the rest of the layer for those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmefficient.attention import row_scores
from mmefficient.graph.block import Attend, Rope, attended, attention, feed, product, store, turned
from mmefficient.offer import LAST
from mmefficient.points import Reducer
from mmefficient.reduction import Prefill, gather_rows


def leaves_within(reducers: list[Reducer]) -> bool:
    """Whether rows that `reducers`, in their order at one site, remove can leave within the layer before the site."""
    return bool(reducers) and all(r.ignores_hidden and r.position_policy == "keep" for r in reducers)


def last_block(
    layer: Any,
    hidden: torch.Tensor,
    rope: Rope,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    attend: Attend,
    last: torch.Tensor,
) -> torch.Tensor:
    """What `block` makes of one row of each prompt, [B, 1, C]; other arguments are those of `block`.

    Args:
        last: int64 [B, 1], the row. attend: is given the query of that row alone.
    """
    _store(layer, hidden, rope, keys, values, slots)
    row, cos, sin = (gather_rows(each, last) for each in (hidden, *rope))
    return feed(layer, attended(layer, row, _query(layer, row, (cos, sin), keys, slots), keys, values, attend))


def leaving_block(
    layer: Any,
    hidden: torch.Tensor,
    prefill: Prefill,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scored: bool,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What `block` makes of the rows that remain after it; other arguments are those of `block`.

    Args:
        scored: `reduce` wants the attention of the last row. reduce: rows that enter the layer -> those that remain.
    """
    before, rope = prefill.now, prefill.rope
    assert rope is not None
    _store(layer, hidden, rope, keys, values, slots)
    if scored:
        assert prefill.last is not None
        row, cos, sin = (gather_rows(each, prefill.last[:, None]) for each in (hidden, *rope))
        seen = torch.arange(before.slots, device=hidden.device) <= prefill.last[:, None]
        seen = seen if before.valid is None else seen & before.valid
        query = _query(layer, row, (cos, sin), keys, slots)
        prefill.scores[LAST] = row_scores(query, keys, seen, None, None, layer.self_attn.scaling)
    hidden = reduce(hidden)
    held, after = prefill.rope, prefill.now.columns[..., None]
    assert held is not None
    mask = before.columns[:, None] <= after
    if before.valid is not None:  # a slot that takes no part sees itself
        mask = mask & before.valid[:, None] | (before.columns[:, None] == after)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        return attention(query, keys, values, mask[:, None], False, scale)

    return feed(layer, attended(layer, hidden, _query(layer, hidden, held, keys, slots), keys, values, attend))


def _store(
    layer: Any, hidden: torch.Tensor, rope: Rope, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    projections = layer.self_attn
    parts = product(hidden, (projections.k_proj, projections.v_proj), layer.input_layernorm)
    key, value = (each.unflatten(-1, (-1, projections.head_dim)) for each in parts)
    store(key, value, rope, keys, values, slots)


def _query(layer: Any, rows: torch.Tensor, rope: Rope, keys: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rotated queries [B, Hq, n, D] of `rows` [B, n, C]."""
    (query,) = product(rows, (layer.self_attn.q_proj,), layer.input_layernorm)
    return turned(query.unflatten(-1, (-1, layer.self_attn.head_dim)), rope, keys, slots)
