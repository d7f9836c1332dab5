"""Decoder layers in which visual rows do less, in few launches; `rows.LayerPlan` says what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmefficient.graph.block import Attend, feed, mix, product, store, turned
from mmefficient.kernels.rms_norm import rms_norm
from mmefficient.kernels.rope_store import rope_store
from mmefficient.reduction import Prefill
from mmefficient.rows import LayerPlan, attend, narrowed
from mmefficient.slots import Slots

Score = Callable[[torch.Tensor, torch.Tensor, float], None]
"""Hands on the attention of some rows: rotated queries of all rows [B, Hq, N, D], keys [B, Hkv, N, D], scale."""


def row_block(
    layer: Any,
    plan: LayerPlan,
    prefill: Prefill,
    hidden: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    usual: Attend,
    score: Score | None,
) -> torch.Tensor:
    """What `layer` makes of `hidden` [B, N, C], which is overwritten, as `rows.RowLayer` does.

    Args:
        keys, values, first: as `block` takes them.
        usual: attention where the plan leaves all pairs; it scores by itself. score: None = nobody asks.
    """
    slots, rope, scale = Slots.of(prefill, hidden), prefill.rope, layer.self_attn.scaling
    assert rope is not None
    hidden = plan.enter(hidden, slots, prefill, within=True)
    if plan.work.attention == "full":

        def patterned(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
            if score is not None:
                score(query, keys, scale)
            return attend(query, keys, values, slots, plan, scale)

        hidden = mix(layer, hidden, rope, keys, values, first, usual if plan.pairs is None else patterned)
        return _feed(layer, plan, slots, hidden)
    projections, size = layer.self_attn, layer.self_attn.head_dim
    normed = rms_norm(hidden, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)[0]
    if plan.work.values:
        key, value = product(normed, (projections.k_proj, projections.v_proj))
    else:
        (key,) = product(normed, (projections.k_proj,))
        (given,) = product(slots.text_rows(normed), (projections.v_proj,))
        value = slots.put_text(torch.zeros_like(key), given, within=True)
    key, value = key.unflatten(-1, (-1, size)), value.unflatten(-1, (-1, size))
    (query,) = product(slots.text_rows(normed) if score is None else normed, (projections.q_proj,))
    query = query.unflatten(-1, (-1, size))
    if score is None:
        query = turned(query, slots.text_rope(rope), keys, first)
        store(key, value, rope, keys, values, first)
    else:  # whoever scores chooses among all rows
        query = rope_store(query, key, value, *rope, keys, values, first)
        score(query, keys, scale)
        query = slots.text_rows(query.transpose(1, 2).flatten(2)).unflatten(-1, (-1, size)).transpose(1, 2)
    seen = attend(query, keys, values, slots, plan, scale).transpose(1, 2).flatten(2)
    if plan.work.attention == "self":
        repeat = query.shape[1] // value.shape[2]
        own = (value if repeat == 1 else value.repeat_interleave(repeat, 2)).flatten(2)
        (hidden,) = product(slots.put_text(own, seen, within=True), (projections.o_proj,), residual=hidden)
        return _feed(layer, plan, slots, hidden)
    (text,) = product(seen, (projections.o_proj,), residual=slots.text_rows(hidden))
    if plan.work.ffn:
        return _feed(layer, plan, slots, slots.put_text(hidden, text, within=True))
    return slots.put_text(hidden, feed(layer, text), within=True)


def _feed(layer: Any, plan: LayerPlan, slots: Slots, hidden: torch.Tensor) -> torch.Tensor:
    """The second half of the layer."""
    share = plan.work.ffn
    if share == 1:
        return feed(layer, hidden)
    text = feed(layer, slots.text_rows(hidden))
    if share:
        flat = hidden.flatten(0, 1)
        rows = feed(layer, flat.index_select(0, slots.image)[None], narrowed(layer.mlp, share))
        flat.index_copy_(0, slots.image, rows[0])
    return slots.put_text(hidden, text, within=True)
