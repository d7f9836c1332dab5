"""Where text and visual rows are among the slots of a prompt, and which pairs exist: made once for all layers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mmefficient.kernels.grouped_attention import Layout
from mmefficient.kernels.grouped_attention.pattern import Pattern as Pairs
from mmefficient.kernels.grouped_attention.pattern import causal
from mmefficient.kernels.grouped_attention.tokens import layout_of
from mmefficient.offer import Rope
from mmefficient.points import Pattern
from mmefficient.reduction import Prefill
from mmefficient.steering import held
from mmefficient.tokens import Role

if TYPE_CHECKING:
    from mmefficient.rows import LayerPlan


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
        self._layouts: dict[tuple[Pairs | None, bool, tuple[Pattern, ...]], Layout] = {}
        self._dense: dict[tuple[Pairs | None, bool, tuple[Pattern, ...]], torch.Tensor] = {}
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

    def layout(self, plan: LayerPlan, text_only: bool, query: torch.Tensor) -> Layout:
        """Pairs of the text rows or of all rows with all keys, for `grouped_attention`."""
        what = plan.pairs, text_only, plan.limits
        if what not in self._layouts:
            self._layouts[what] = layout_of(
                self.tokens,
                plan.pairs or causal(),
                queries=self.own if text_only else None,
                mask=None if text_only else self._limit(plan),
                group=None,
                groups=1,
                head_dim=query.shape[-1],
                dtype=query.dtype,
                exact=self.exact,
            )
        return self._layouts[what]

    def dense(self, plan: LayerPlan, text_only: bool = True) -> torch.Tensor:
        """The same as a mask, bool [B, 1, t or n, n]; rows that would see nothing see everything."""
        what = plan.pairs, text_only, plan.limits
        if what not in self._dense:
            options: dict[str, Any] = {"queries": self.own} if text_only else {"mask": self._limit(plan)}
            pairs = plan.pairs or causal()
            seen = layout_of(self.tokens, pairs, group=None, groups=1, impl="reference", **options).visible()
            self._dense[what] = seen | ~seen.any(-1, keepdim=True)
        return self._dense[what]

    def _limit(self, plan: LayerPlan) -> torch.Tensor | None:
        """What the patterns' limits leave, bool [B, n, n]; they say nothing about text rows."""
        found = [each.limit(self.tokens) for each in plan.limits]
        return torch.stack(found).all(0) if found else None
