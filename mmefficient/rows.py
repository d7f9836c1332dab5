"""Runs a decoder layer in which visual rows do less than others, or see other pairs, on the layer's own sub-modules.

Nothing is masked that need not be computed: where visual rows ask nothing, the query projection, the attention and, if
the method says so, the output projection and the FFN run on the text rows alone. Rows stay in prompt order, so keys and
values go into the cache as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn

from mmefficient.attention import KEY, score
from mmefficient.cache import store_first
from mmefficient.errors import ModelError, PlanError
from mmefficient.kernels.grouped_attention import Layout, grouped_attention
from mmefficient.kernels.grouped_attention.pattern import IMAGE, SOLO, causal
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.tokens import layout_of
from mmefficient.offer import Rope
from mmefficient.points import EVERYTHING, LayerMethod, Pattern, RowPolicy, VisualWork
from mmefficient.reduction import Prefill
from mmefficient.steering import held
from mmefficient.tokens import Role

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter

FEW_KEYS = 2048
"""With fewer keys than this, one dense mask for the text rows costs less than planning blocks and launching them."""
FEW_KEYS_IDLE = 8192
"""The same where visual rows skip the FFN: a GPU then waits for launches, and the dense mask takes fewer."""

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
FFN_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_CHECKED: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class LayerPlan:
    """What a plan's patterns and row policies come to in one layer.

    Attributes:
        pairs: which pairs exist; None = causal.
        source: makes the visual rows from the projector's input; None = they come from the layer before.
    """

    work: VisualWork
    pairs: Pairs | None
    source: nn.Module | None

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
        return cls(work, pairs, source)

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


class Slots:
    """Where text and visual rows are among the n slots of a prompt's segment; made once for all layers that hold it.

    Attributes:
        visual: bool [B, n].
        own: int64 [B, t], the slot of each text row, packed to the right; -1 = filled up.
        text: int64, flat numbers of those slots, filled up by others of the same row; filled: bool [B, t], where.
        ragged: whether some may be filled up.
    """

    def __init__(self, prefill: Prefill, slots: int, device: torch.device) -> None:
        self.segment, facts = prefill.segment, prefill.facts
        self.exact = facts.separators is None
        tokens = held(prefill).to(device)
        role = tokens.role
        is_text = (role != Role.PAD) & (role != Role.IMAGE)
        texts, self._pictured = list(facts.others), [0] * len(role)
        for unit in next(iter(prefill.units.values())).units:
            self._pictured[unit.row] += unit.count
        if facts.lines:  # only the device knows how many separators stay
            bound = facts.separators
            texts = is_text.sum(1).tolist() if bound is None else [count + bound for count in texts]
        most = min(max(texts), slots)
        order = is_text.to(torch.uint8).argsort(dim=1, stable=True)[:, slots - most :]
        self.visual = role == Role.IMAGE
        self.filled = ~is_text.gather(1, order)
        self.ragged = len(set(texts)) > 1 or bool(facts.lines and not self.exact)
        self.own = order.masked_fill(self.filled, -1)
        self.text = (order + slots * torch.arange(len(order), device=device)[:, None]).flatten()
        if facts.tail is not None and not facts.drafts:  # the filling of a bucket is computed, but nobody sees it
            behind = torch.arange(slots, device=device) >= slots - facts.tail.to(device)[:, None]
            tokens = tokens.replace(role=role.masked_fill(behind, int(Role.PAD)))
        self.tokens = tokens
        self._layouts: dict[tuple[Pairs | None, bool], Layout] = {}
        self._dense: dict[tuple[Pairs | None, bool], torch.Tensor] = {}
        self._rope: tuple[Rope, Rope] | None = None

    @classmethod
    def of(cls, prefill: Prefill, hidden: torch.Tensor) -> Slots:
        """Those of the rows `hidden` [B, n, D], which a layer is about to read."""
        slots = prefill.slots
        if slots is None or slots.segment is not prefill.segment or slots.visual.device != hidden.device:
            slots = prefill.slots = cls(prefill, hidden.shape[1], hidden.device)
        return slots

    @cached_property
    def image(self) -> torch.Tensor:
        """int64, flat numbers of the visual slots, in order."""
        order = (~self.visual).to(torch.uint8).argsort(dim=1, stable=True)
        rows, slots = order.shape
        flat = (order + slots * torch.arange(rows, device=order.device)[:, None]).flatten()
        chosen = torch.cat([torch.arange(count) + row * slots for row, count in enumerate(self._pictured)])
        return flat[chosen.to(order.device)]

    @cached_property
    def patches(self) -> torch.Tensor:
        """int64, the tower patch of each visual slot; -1 = not one patch."""
        return self.tokens.source.flatten()[self.image]

    def text_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, n, D] -> [B, t, D]."""
        return x.flatten(0, 1).index_select(0, self.text).view(*self.own.shape, -1)

    def add_text(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """x [B, n, D] plus `rows` [B, t, D] at the text slots."""
        rows = rows.masked_fill(self.filled[..., None], 0.0) if self.ragged else rows
        return x.flatten(0, 1).index_add(0, self.text, rows.flatten(0, 1)).view_as(x)

    def put_text(self, x: torch.Tensor, rows: torch.Tensor, within: bool = False) -> torch.Tensor:
        """x [B, n, D] with `rows` [B, t, D] at the text slots; `within`: in the memory of x."""
        if self.ragged:
            rows = torch.where(self.filled[..., None], self.text_rows(x), rows)
        flat = x.flatten(0, 1)
        put = flat.index_copy_ if within else flat.index_copy
        return put(0, self.text, rows.flatten(0, 1)).view_as(x)

    def text_rope(self, rope: Rope) -> Rope:
        """Cosine and sine of the text rows, [B, t, d] each, out of all rows' [B or 1, n, d]."""
        if self._rope is None or self._rope[0] is not rope:
            cos, sin = (self.text_rows(table.expand(len(self.own), -1, -1)) for table in rope)
            self._rope = rope, (cos, sin)
        return self._rope[1]

    def layout(self, pairs: Pairs | None, text_only: bool, query: torch.Tensor) -> Layout:
        """Pairs of the text rows or of all rows with all keys, for `grouped_attention`."""
        if (pairs, text_only) not in self._layouts:
            self._layouts[pairs, text_only] = layout_of(
                self.tokens,
                pairs or causal(),
                queries=self.own if text_only else None,
                group=None,
                groups=1,
                head_dim=query.shape[-1],
                dtype=query.dtype,
                exact=self.exact,
            )
        return self._layouts[pairs, text_only]

    def dense(self, pairs: Pairs | None, text_only: bool = True) -> torch.Tensor:
        """The same as a mask, bool [B, 1, t or n, n]; rows that would see nothing see everything."""
        if (pairs, text_only) not in self._dense:
            queries = self.own if text_only else None
            layout = layout_of(self.tokens, pairs or causal(), queries=queries, group=None, groups=1, impl="reference")
            seen = layout.visible()
            self._dense[pairs, text_only] = seen | ~seen.any(-1, keepdim=True)
        return self._dense[pairs, text_only]


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
        if self.simulate:
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
        key, value = self.heads("k", normed), self.heads("v", normed)
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
        pairs, visual = self.plan.pairs, slots.visual[..., None]
        seen = slots.dense(pairs, text_only=False)
        if work.attention != "full":
            itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
            seen = torch.where(visual[:, None], itself, seen)
        if stock is not None and stock.shape[-1] > seen.shape[-1]:  # a static cache offers unwritten rows
            seen = F.pad(seen, (0, stock.shape[-1] - seen.shape[-1]))
        mask = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
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
    packed = plan.work.attention != "full"
    few = FEW_KEYS if plan.work.ffn else FEW_KEYS_IDLE
    if query.is_cuda and not slots.exact:  # nobody waits for launches
        few = 0
    if packed and key.shape[2] < few and key.shape[1] == query.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=slots.dense(plan.pairs), scale=scale)
    out = grouped_attention(query, key, value, slots.layout(plan.pairs, packed, query), scale=scale)
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


def check_layer(layer: Any, plan: LayerPlan, adapter: Adapter, flash: bool) -> None:
    """Refuse layers that compute something other than `RowLayer` would.

    Raises:
        ModelError: names what is missing or what differs.
    """
    name = type(layer).__name__
    parts, projections = ({part for part, _ in m.named_children()} for m in (layer, layer.self_attn))
    if parts != LAYER_PARTS or not PROJECTIONS <= projections <= PROJECTIONS | HEAD_NORMS:
        found = ", ".join(sorted(parts ^ LAYER_PARTS | projections ^ PROJECTIONS))
        raise ModelError(
            f"{name} is not the usual decoder layer ({found} differ); its visual rows cannot be run apart."
        )
    if not hasattr(sys.modules[type(layer.self_attn).__module__], "rotate_half"):
        raise ModelError(f"{name} rotates queries and keys in its own way; its visual rows cannot be run apart.")
    if 0 < plan.work.ffn < 1:
        linear = [getattr(layer.mlp, part, None) for part in sorted(FFN_PARTS - {"act_fn"})]
        if {part for part, _ in layer.mlp.named_children()} != FFN_PARTS or any(
            type(m) is not nn.Linear for m in linear
        ):
            raise ModelError(f"{type(layer.mlp).__name__} is no gated FFN of plain matrices; its width cannot be cut.")
        if layer.mlp.up_proj.weight.is_meta:
            raise ModelError("the FFN of offloaded weights cannot be cut; load the model on one device.")
    if layer.training or layer in _CHECKED:
        return
    weight = layer.input_layernorm.weight
    # offloaded weights are elsewhere until their module runs
    device = layer.input_layernorm._hf_hook.execution_device if weight.is_meta else weight.device
    probe = torch.randn(1, 2, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(device, weight.dtype)
    position = torch.arange(2, device=device)[None]
    rope = adapter.decoder.rotary_emb(probe, position.expand(3, 1, -1) if adapter.mrope else position)
    ours = RowLayer(layer, plan, False, layer.forward)
    with torch.no_grad():
        normed = layer.input_layernorm(probe)
        query, key, value = (ours.heads(part, normed) for part in "qkv")
        query, key = ours.rotate(query, rope), ours.rotate(key, rope)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        options = {"is_causal": True, "scale": layer.self_attn.scaling, "enable_gqa": True}
        update = F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(2)
        rows = probe + layer.self_attn.o_proj(update)
        rows = rows + ours.mlp(rows)
        mask = None if flash else torch.full((2, 2), torch.finfo(probe.dtype).min).triu(1)[None, None].to(probe)
        stock = layer(probe, attention_mask=mask, position_embeddings=rope, position_ids=position)
    if not torch.allclose(rows - probe, stock - probe, rtol=0.1, atol=0.05 * float((stock - probe).abs().max())):
        raise ModelError(
            f"{name} computes something else than the usual decoder layer; its visual rows cannot be run apart."
        )
    _CHECKED.add(layer)


def _rotation(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return sys.modules[type(layer.self_attn).__module__].rotate_half
