"""Runs a decoder layer in which visual rows do less than others, or see other pairs, on the layer's own sub-modules.

Nothing is masked that need not be computed: where visual rows ask nothing, the query projection, the attention and, if
the method says so, the output projection and the FFN run on the text rows alone. Rows stay in prompt order, so keys and
values go into the cache as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mmefficient.attention import KEY, score
from mmefficient.cache import store_first
from mmefficient.errors import PlanError
from mmefficient.kernels.grouped_attention import grouped_attention
from mmefficient.kernels.grouped_attention.pattern import IMAGE, SOLO
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.offer import Rope
from mmefficient.points import EVERYTHING, LayerMethod, Pattern, RowPolicy, VisualWork
from mmefficient.reduction import Prefill
from mmefficient.slots import Slots

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter

FEW_KEYS = 2048
"""With fewer keys than this, one dense mask for the text rows costs less than planning blocks and launching them."""
FEW_KEYS_IDLE = 8192
"""The same where visual rows skip the FFN: a GPU then waits for launches, and the dense mask takes fewer."""


@dataclass(frozen=True)
class LayerPlan:
    """What a plan's patterns and row policies come to in one layer.

    Attributes:
        pairs: which pairs exist; None = causal.
        source: makes the visual rows from the projector's input; None = they come from the layer before.
        limits: patterns that leave out further pairs (`Pattern.limit`).
        own: a pattern that computes the attention itself (`Pattern.attend`).
    """

    work: VisualWork
    pairs: Pairs | None
    source: nn.Module | None
    limits: tuple[Pattern, ...] = ()
    own: Pattern | None = None

    @property
    def recordable(self) -> bool:
        """Whether the layer can be part of a recorded program."""
        return not self.limits and self.own is None and (self.work.values or self.work.attention != "full")

    @classmethod
    def of(cls, methods: Sequence[LayerMethod], layer: int, adapter: Adapter) -> LayerPlan | None:
        """Compose the methods that act in `layer`; None = none does."""
        acting = [method for method in methods if method.acts(layer)]
        if not acting:
            return None
        work, pairs, source = EVERYTHING, None, None
        for method in acting:
            if isinstance(method, Pattern):
                try:
                    pairs = method.pairs() if pairs is None else pairs & method.pairs()
                except ValueError as error:
                    raise PlanError(f"{method} in layer {layer}: {error}") from error
            elif isinstance(method, RowPolicy):
                work &= method.work(layer)
                if method.sources:
                    source = method.source(layer, adapter.base, adapter.tower_parts()[0])
        if pairs is not None and (rule := pairs.rules()[IMAGE]) & SOLO:  # such rows need no query
            work &= VisualWork("self" if rule & 0xFF else "nothing")
        if source is not None:
            matrices = sum(p.numel() for p in source.parameters() if p.ndim == 2)
            work = replace(work, extra=work.extra + matrices)
        patterns = [method for method in acting if isinstance(method, Pattern)]
        limits = tuple(each for each in patterns if type(each).limit is not Pattern.limit)
        own = next((each for each in patterns if type(each).attend is not Pattern.attend), None)
        if own is not None and (len(patterns) > 1 or work.attention != "full"):
            raise PlanError(f"{own} computes the attention of layer {layer} itself; leave out what else changes it.")
        return cls(work, pairs, source, limits, own)

    def enter(self, hidden: torch.Tensor, slots: Slots, prefill: Prefill, within: bool = False) -> torch.Tensor:
        """`hidden` [B, n, D] with the visual rows that `source` makes, if it does; `within`: in the same memory."""
        if self.source is None:
            return hidden
        assert prefill.tower is not None
        assert prefill.tower.features is not None
        features = prefill.tower.features
        patches = prefill.recall("patches", lambda: features[slots.patches.to(features.device)].to(hidden))
        rows = self.source(patches.to(hidden.device)).to(hidden)
        flat = hidden.flatten(0, 1)
        return (flat.index_copy_ if within else flat.index_copy)(0, slots.image, rows).view_as(hidden)


class RowLayer:
    """Stands in for the `forward` of one decoder layer while a prompt with visual tokens is read."""

    def __init__(self, layer: Any, plan: LayerPlan, simulate: bool, stock: Callable[..., Any]) -> None:
        self.layer, self.plan, self.simulate = layer, plan, simulate
        self.__wrapped__ = stock

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = kwargs.get(KEY)
        prefill: Prefill | None = None if call is None else call.prefill
        if prefill is None or not prefill.has_visual:
            return self.__wrapped__(hidden_states, *args, **kwargs)
        slots = Slots.of(prefill, hidden_states)
        hidden = self.plan.enter(hidden_states, slots, prefill)
        normed = self.layer.input_layernorm(hidden)
        if self.simulate and self.plan.own is None:
            return self._hide(hidden, normed, slots, kwargs)
        work = self.plan.work
        if work.attention == "full" and self.plan.pairs is None:
            hidden = hidden + self.layer.self_attn(hidden_states=normed, **kwargs)[0]
            return self._ffn(hidden, slots)
        attended = self._attend(normed, slots, call, kwargs)
        project = self.layer.self_attn.o_proj
        if work.attention != "nothing":
            return self._ffn(hidden + project(attended), slots)
        if work.ffn:
            return self._ffn(slots.add_text(hidden, project(attended)), slots)
        text = slots.text_rows(hidden) + project(attended)
        return slots.put_text(hidden, text + self.mlp(text))

    def _attend(self, normed: torch.Tensor, slots: Slots, call: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """Heads' outputs side by side: [B, n, H * d], or [B, t, H * d] of the text rows if visual rows get nothing."""
        attention, rope = self.layer.self_attn, kwargs["position_embeddings"]
        packed = self.plan.work.attention != "full"
        scored = any(True for _ in call.asking(attention.layer_idx))
        every = scored or not packed  # whoever scores chooses among all rows
        key, value = self.heads("k", normed), self._values(normed, slots)
        query = self.heads("q", normed if every else slots.text_rows(normed))
        # rotated while rows are contiguous, which is several times faster than after the transposition
        query = self.rotate(query, rope if every else slots.text_rope(rope))
        query, key, value = (x.transpose(1, 2) for x in (query, self.rotate(key, rope), value))
        if scored:
            mask = kwargs.get("attention_mask")
            score(call, attention, query, key, None if mask is None else mask[..., : key.shape[2]], attention.scaling)
        if scored and packed:
            chosen = slots.text_rows(query.transpose(1, 2).flatten(2))
            query = chosen.unflatten(2, (-1, key.shape[3])).transpose(1, 2)
        if kwargs.get("past_key_values") is not None:
            store_first(kwargs["past_key_values"], attention.layer_idx, key, value)
        seen = attend(query, key, value, slots, self.plan, attention.scaling)
        out = seen.transpose(1, 2).flatten(2)
        if self.plan.work.attention != "self":
            return out
        repeat = query.shape[1] // value.shape[1]
        own = value if repeat == 1 else value.repeat_interleave(repeat, 1)
        return slots.put_text(own.transpose(1, 2).flatten(2), out)

    def _values(self, normed: torch.Tensor, slots: Slots) -> torch.Tensor:
        """Values [B, n, heads, d]; zeros of visual rows that give none."""
        if self.plan.work.values:
            return self.heads("v", normed)
        value = self.heads("v", slots.text_rows(normed))
        none = value.new_zeros(*normed.shape[:2], value[0, 0].numel())
        return slots.put_text(none, value.flatten(2)).unflatten(2, value.shape[2:])

    def heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [B, n, D] -> queries, keys or values [B, n, heads, d], normed per head where the family does."""
        attention = self.layer.self_attn
        heads = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return heads if norm is None else norm(heads)

    def rotate(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Queries or keys [B, n, heads, d] at their positions."""
        cos, sin = (table.unsqueeze(2) for table in rope)
        return x * cos + _rotation(self.layer)(x) * sin

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.mlp(self.layer.post_attention_layernorm(x))

    def _ffn(self, hidden: torch.Tensor, slots: Slots) -> torch.Tensor:
        """The second half of the layer."""
        share = self.plan.work.ffn
        if share == 1:
            return hidden + self.mlp(hidden)
        text = slots.text_rows(hidden)
        out = slots.add_text(hidden, self.mlp(text))
        if not share:
            return out
        rows = hidden.flatten(0, 1).index_select(0, slots.image)
        rows = thin(self.layer.mlp, self.layer.post_attention_layernorm(rows), share)
        return out.flatten(0, 1).index_add(0, slots.image, rows).view_as(out)

    def _hide(self, hidden: torch.Tensor, normed: torch.Tensor, slots: Slots, kwargs: dict[str, Any]) -> torch.Tensor:
        """The same result by computing every row and masking: for accuracy studies and as a check."""
        work, stock = self.plan.work, kwargs.get("attention_mask")
        visual = slots.visual[..., None]
        seen = slots.dense(self.plan, text_only=False)
        if work.attention != "full":
            itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
            seen = torch.where(visual[:, None], itself, seen)
        if stock is not None and stock.shape[-1] > seen.shape[-1]:  # a static cache offers unwritten rows
            seen = F.pad(seen, (0, stock.shape[-1] - seen.shape[-1]))
        mask = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        project, none = self.layer.self_attn.v_proj, partial(_without, slots.visual)
        with nullcontext() if work.values else project.register_forward_hook(none):
            update = self.layer.self_attn(hidden_states=normed, **{**kwargs, "attention_mask": mask})[0]
        if work.attention == "nothing":
            update = update.masked_fill(visual, 0.0)
        hidden = hidden + update
        update = self.mlp(hidden)
        if work.ffn < 1:
            rows = self.layer.post_attention_layernorm(hidden)
            less = thin(self.layer.mlp, rows, work.ffn) if work.ffn else torch.zeros_like(update)
            update = torch.where(visual, less, update)
        return hidden + update


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: Slots, plan: LayerPlan, scale: float
) -> torch.Tensor:
    """Attention of all rows, or of the text rows where visual rows ask nothing: [B, H, n or t, d]."""
    if plan.own is not None:
        return plan.own.attend(query, key, value, slots.tokens, scale)
    packed = plan.work.attention != "full"
    few = FEW_KEYS if plan.work.ffn else FEW_KEYS_IDLE
    if query.is_cuda and not slots.exact:  # nobody waits for launches
        few = 0
    if packed and key.shape[2] < few and key.shape[1] == query.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=slots.dense(plan), scale=scale)
    out = grouped_attention(query, key, value, slots.layout(plan, packed, query), scale=scale)
    assert isinstance(out, torch.Tensor)
    return out


class Part(NamedTuple):
    """Some rows or columns of a linear layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def narrowed(mlp: Any, share: float) -> tuple[Part, Part, Part]:
    """Gate, up and down projection of a gated FFN of which only the first `share` of the inner width is computed."""
    width = max(1, round(share * mlp.gate_proj.out_features))
    gate, up = (
        Part(linear.weight[:width], None if linear.bias is None else linear.bias[:width])
        for linear in (mlp.gate_proj, mlp.up_proj)
    )
    return gate, up, Part(mlp.down_proj.weight[:, :width], mlp.down_proj.bias)


def thin(mlp: Any, x: torch.Tensor, share: float) -> torch.Tensor:
    """What an FFN `narrowed` to `share` makes of x."""
    gate, up, down = narrowed(mlp, share)
    return F.linear(mlp.act_fn(F.linear(x, *gate)) * F.linear(x, *up), *down)


def _without(visual: torch.Tensor, module: nn.Module, args: tuple[Any, ...], values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(visual[..., None], 0.0)


def _rotation(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return sys.modules[type(layer.self_attn).__module__].rotate_half
