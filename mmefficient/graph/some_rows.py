"""Decoder layers of which only some rows are wanted: keys and values of all, and the rest of the layer for those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmefficient.graph.block import Attend, Rope, attention, feed, product
from mmefficient.kernels.key_scores import key_scores
from mmefficient.kernels.rope_store import rope_store
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
    row, *turn = (gather_rows(each, last) for each in (hidden, *rope))
    return _rest(layer, row, _query(layer, row, turn, keys, slots), keys, values, attend)


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
    place = torch.arange(before.slots, device=hidden.device)
    if scored:
        assert prefill.last is not None
        row, *turn = (gather_rows(each, prefill.last[:, None]) for each in (hidden, *rope))
        seen = place <= prefill.last[:, None]
        seen = seen if before.valid is None else seen & before.valid
        query = _query(layer, row, turn, keys, slots)
        scale = layer.self_attn.scaling
        prefill.scores[LAST] = key_scores(query, keys, scale=scale, mask=seen[:, None, None], heads="mean")
    hidden = reduce(hidden)
    turned, after = prefill.rope, prefill.now.columns[..., None]
    assert turned is not None
    mask = before.columns[:, None] <= after
    if before.valid is not None:  # a slot that takes no part sees itself
        mask = mask & before.valid[:, None] | (before.columns[:, None] == after)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        return attention(query, keys, values, mask[:, None], False, scale)

    return _rest(layer, hidden, _query(layer, hidden, turned, keys, slots), keys, values, attend)


def _store(
    layer: Any, hidden: torch.Tensor, rope: Rope, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    projections = layer.self_attn
    parts = product(hidden, (projections.k_proj, projections.v_proj), layer.input_layernorm)
    key, value = (each.unflatten(-1, (-1, projections.head_dim)) for each in parts)
    rope_store(key[:, :, :0], key, value, *rope, keys, values, slots)


def _query(layer: Any, rows: torch.Tensor, rope: Any, keys: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rotated queries [B, Hq, n, D] of `rows` [B, n, C]."""
    (query,) = product(rows, (layer.self_attn.q_proj,), layer.input_layernorm)
    query = query.unflatten(-1, (-1, layer.self_attn.head_dim))
    none, (cos, sin) = query[:, :, :0], rope
    return rope_store(query, none, none, cos, sin, keys[:, :0], keys[:, :0], slots)


def _rest(
    layer: Any, rows: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """The layer behind its queries; `rows` are overwritten."""
    mixed = attend(query, keys, values, layer.self_attn.scaling).transpose(1, 2).flatten(2)
    (rows,) = product(mixed, (layer.self_attn.o_proj,), residual=rows)
    return feed(layer, rows)
