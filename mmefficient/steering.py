"""Modulations at work: what a layer's attention becomes, on the kernels, while a prompt or a later turn is read.

Rows that no method touches keep the stock attention's output. Only the touched ones are computed by the kernels, so a
method that acts on the last row costs one row; while decoding, one kernel call takes the place of the stock one. A
head gain alone needs no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mmefficient.cache import written_rows
from mmefficient.kernels.decode_attention import MAX_NEW, decode_attention
from mmefficient.kernels.grouped_attention import Layout, Pattern, grouped_attention, make_layout
from mmefficient.kernels.grouped_attention.tokens import layout_of
from mmefficient.masks import hiding, seen_by_last
from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows, answering
from mmefficient.steered import KeyFacts, Part, new_rows, owner_of, run_with, scaled
from mmefficient.tokens import Role, TokenMap

if TYPE_CHECKING:
    from mmefficient.call import Call
    from mmefficient.reduction import Prefill

WIDEST_FIRST: tuple[Rows, ...] = ("all", "answer", "last")
KERNEL = frozenset({"bias", "map", "mix"})
Stock = Callable[[], torch.Tensor]
Decide = Callable[[torch.Tensor], torch.Tensor | None]
Beside = Callable[[Decide | None], None]


class Aside:
    """Travels in place of a `Call` through one layer of the blind prompt.

    Attributes:
        decide: given the heads' outputs in the last prompt row, float32 [B, Hq, d], says the factor on each head.
        last: int64 [B], that row; None = the last one everywhere.
    """

    state = prefill = None

    def __init__(self, decide: Decide | None, last: torch.Tensor | None) -> None:
        self.decide, self.last = decide, last

    def attended(self, out: torch.Tensor) -> torch.Tensor:
        """Note, and scale, the output of the heads, [B, n, Hq, d]."""
        gain = None if self.decide is None else self.decide(pick(out, self.last).float())
        return out if gain is None else (out * gain[:, None, :, None]).to(out.dtype)


def held(prefill: Prefill) -> TokenMap:
    """The token map of the slots that the current layer holds; PAD where a slot takes no part."""
    segment, tokens = prefill.segment, prefill.state.tokens
    if segment is None:
        return tokens
    return prefill.recall("held", lambda: tokens.gather(segment.columns, segment.valid))


def layout(prefill: Prefill, like: torch.Tensor, pattern: Pattern | None = None, **options: Any) -> Layout:
    """The layout of the slots that the current layer holds.

    Args:
        like: the queries, whose head size and dtype choose the blocks.
        options: as for `make_layout`; no key groups unless given.
    """
    options = {"group": None, "groups": 1, "head_dim": like.shape[-1], "dtype": like.dtype, "exact": False} | options
    return layout_of(held(prefill), pattern, **options)


def attend(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: Call,
    scale: float,
    stock: Stock,
) -> torch.Tensor:
    """Attention of one layer under the modulations of `call`.

    Args:
        query, key, value, mask: as the attention function gets them.
        stock: gives the stock attention, [B, Q, Hq, d].

    Returns:
        [B, Q, Hq, d].
    """
    prefill = call.prefill
    if prefill is None:
        return _later(layer, query, key, value, mask, call, scale, stock)
    slots = query.shape[2]  # a static cache offers unwritten rows
    methods = call.modulated.get(layer, ()) if prefill.has_visual else ()
    beside = None if prefill.blind is None else partial(prefill.blind.advance, call.layers, layer)
    return Reading(layer, query, key[:, :, :slots], value[:, :, :slots], prefill, scale).attend(methods, stock, beside)


class Reading:
    """One layer of a prompt that is being read."""

    def __init__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefill: Prefill, scale: float
    ) -> None:
        self.query, self.key, self.value, self.prefill, self.scale = query, key, value, prefill, scale
        tokens = held(prefill)
        self.prompt = LayerPrompt(
            layer, tokens, query, key, value, scale, prefill.hidden, tower=prefill.tower, tail=self.tail
        )

    def attend(self, methods: Sequence[Modulation], stock: Stock, beside: Beside | None) -> torch.Tensor:
        """Attention under `methods`; leaves in the prompt's state what decoding goes on with.

        Args:
            beside: reads this layer of the blind prompt, if there is one.
        """
        prefill = self.prefill
        out, parts = stock(), []
        if prefill.key_bias is not None:
            parts.append(Part("all", Change(), bias=KeyFacts(prefill.key_bias[:, None], self.tail)))
        parts += [self.part(method) for method in methods if method.changes & KERNEL]
        for place, rows in enumerate(WIDEST_FIRST):
            if any(part.in_kernel and part.rows == rows for part in parts):
                wider = [part for part in parts if part.rows in WIDEST_FIRST[: place + 1]]
                out = self.rows(rows).put(out, self.kernel(wider, rows))
        heads = [method for method in methods if not method.changes & KERNEL]
        if beside is None or not any("blind" in method.needs for method in heads):
            if beside is not None:
                beside(None)
            parts += [self.part(method) for method in heads]
        else:
            last = pick(out, prefill.last)

            def decide(seen: torch.Tensor) -> torch.Tensor | None:
                self.prompt = replace(self.prompt, heads=last.float(), blind=seen)
                parts.extend(self.part(method) for method in heads)
                gains = [part.change.gain for part in parts if part.change.blind_too]
                return torch.stack(gains).prod(0) if gains else None  # type: ignore[arg-type]

            beside(decide)
        for part in parts:
            if part.change.gain is not None:
                places = self.rows(part.rows)
                query = places.take(self.query.transpose(1, 2)).transpose(1, 2)
                out = places.put(out, scaled(places.take(out), part.change.gain, query))
        if parts:
            prefill.state.steered[self.prompt.layer] = tuple(parts)
        return out

    @property
    def tail(self) -> torch.Tensor | None:
        """bool [B, n]: slots at the end whose keys the prompt loses again; None = there are none."""
        tail, slots = self.prefill.facts.tail, self.query.shape[2]
        if tail is None:
            return None
        place = torch.arange(slots, device=tail.device)
        return self.prefill.recall("tail", lambda: place >= slots - tail[:, None])

    def part(self, method: Modulation) -> Part:
        """Ask a method what it does in this layer."""
        change, group = method.change(self.prompt), None
        if method.changes & {"map", "mix"}:

            def make() -> KeyFacts:
                return KeyFacts(method.group(self.prompt).int(), self.tail, method.later)

            group = make() if method.per_layer else self.prefill.recall(method, make)
        bias = None if change.bias is None else KeyFacts(change.bias.expand(-1, -1, self.query.shape[2]), self.tail)
        return Part(method.rows, change, method.groups, group, bias)

    def rows(self, rows: Rows) -> Places:
        """Where `rows` are among the slots."""
        slots, prefill = self.query.shape[2], self.prefill
        if rows == "all":
            return Places(slots)
        if rows == "answer":
            width = max(1, min(slots, prefill.facts.answers))
            acts = prefill.recall("answering", lambda: answering(held(prefill)))
            return Places(width, acts[:, slots - width :])
        last, count = prefill.last, 1 + prefill.facts.drafts
        if last is None:
            return Places(1)
        return Places(count, index=last[:, None] + torch.arange(count, device=last.device))

    def kernel(self, parts: Sequence[Part], rows: Rows) -> torch.Tensor:
        """Attention of `rows` under `parts`, [B, R, Hq, d]."""
        places, owner, tokens = self.rows(rows), owner_of(parts), held(self.prefill)
        biases = [part.bias.prompt for part in parts if part.bias is not None]
        query = places.take(self.query.transpose(1, 2)).transpose(1, 2)
        options: dict[str, Any] = {}
        if owner is not None and owner.group is not None:
            options |= {"group": owner.group.prompt, "groups": owner.groups}
        if rows == "last" and places.count <= MAX_NEW:
            unseen = self.prefill.recall("unseen", lambda: hiding(tokens.role != Role.PAD))
            batch, slots = query.shape[0], self.query.shape[2]
            end = torch.full((batch,), slots, device=query.device) if places.index is None else places.index[:, -1] + 1
            run = partial(decode_attention, query, self.key, self.value, end, scale=self.scale, **options)
            return run_with(run, owner, [*biases, unseen]).transpose(1, 2)
        shared = owner.group if owner is not None else None
        options |= {"queries": places.count if places.index is None else places.index}
        plan = self.prefill.recall((shared, rows), lambda: self.plan(owner, options))
        run = partial(grouped_attention, query, self.key, self.value, plan, scale=self.scale)
        return run_with(run, owner, biases).transpose(1, 2)

    def plan(self, owner: Part | None, options: dict[str, Any]) -> Layout:
        """The blocks of a kernel call; with groups by head, for heads as rows."""
        if owner is None or not owner.per_head:
            return layout(self.prefill, self.query, **options)
        return by_head(held(self.prefill).role, self.query, options)


def by_head(role: torch.Tensor, query: torch.Tensor, options: dict[str, Any]) -> Layout:
    """The plan of blocks for heads as rows; `options` as for `make_layout`, with the group [B, Hq, n]."""
    heads = query.shape[1]
    rows: dict[str, Any] = {"group": options["group"].flatten(0, 1)}
    if torch.is_tensor(options["queries"]):
        rows["queries"] = options["queries"].repeat_interleave(heads, 0)
    given: dict[str, Any] = {"head_dim": query.shape[-1], "dtype": query.dtype, "exact": False} | options | rows
    return make_layout(role.repeat_interleave(heads, 0), **given)


@dataclass(frozen=True, eq=False)
class Places:
    """Some rows of every prompt: the last `count` slots, of which `acts` are meant, bool [B, count], or all; or the
    slots `index`, int64 [B, count]."""

    count: int
    acts: torch.Tensor | None = None
    index: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of x [B, n, ...]."""
        return x[:, -self.count :] if self.index is None else x[_each(self.index), self.index]

    def put(self, out: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`out` [B, n, ...] with these rows exchanged for `new`, where they are meant."""
        if self.index is not None:
            return out.index_put((_each(self.index), self.index), new)
        if self.acts is not None:
            new = torch.where(self.acts[..., None, None], new, self.take(out))
        return new if self.count == out.shape[1] else torch.cat([out[:, : -self.count], new], 1)


def _each(index: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(index), device=index.device)[:, None]


def _later(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: Call,
    scale: float,
    stock: Stock,
) -> torch.Tensor:
    """Attention of new rows over a stored prompt, [B, Q, Hq, d]."""
    assert call.state is not None
    parts, rows = call.state.steered[layer], query.shape[2]
    width = {part: min(rows, 1 + call.drafts) if part.rows == "last" else rows for part in parts}
    working = [part for part in parts if part.in_kernel]
    if working and rows <= MAX_NEW and all(each == rows for each in width.values()):
        lengths, unseen = call.stored(layer, mask, key)
        return new_rows(parts, query, key, value, scale, lengths, unseen=unseen).transpose(1, 2)
    out = stock()
    for size in sorted({width[part] for part in working}, reverse=True):
        new = _turn(layer, query, key, value, mask, call, scale, [p for p in working if width[p] >= size], size)
        out = Places(size).put(out, new)
    for part in parts:
        if part.change.gain is not None:
            places = Places(width[part])
            out = places.put(out, scaled(places.take(out), part.change.gain, query[:, :, -width[part] :]))
    return out


def _turn(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: Call,
    scale: float,
    parts: Sequence[Part],
    width: int,
) -> torch.Tensor:
    """The last `width` of many new rows under `parts`, [B, width, Hq, d]."""
    keys = written_rows(call.cache, layer, key.shape[2])
    key, value = key[:, :, :keys], value[:, :, :keys]
    role = torch.full((len(key), keys), int(Role.QUESTION), device=key.device)
    if mask is not None:
        role = role.masked_fill(~seen_by_last(mask)[:, :keys], int(Role.PAD))
    owner = owner_of(parts)
    options: dict[str, Any] = {"queries": width, "head_dim": query.shape[-1], "dtype": query.dtype, "exact": False}
    if owner is not None and owner.group is not None:
        options |= {"group": owner.group.upto(keys), "groups": owner.groups}
    per_head = owner is not None and owner.per_head
    plan = by_head(role, query, options) if per_head else make_layout(role, **options)
    biases = [part.bias.upto(keys) for part in parts if part.bias is not None]
    run = partial(grouped_attention, query[:, :, -width:], key, value, plan, scale=scale)
    return run_with(run, owner, biases).transpose(1, 2)


def pick(out: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
    """Row `row[b]` of every [n, ...] in `out` [B, n, ...]; None = the last one."""
    if row is None:
        return out[:, -1]
    return out[torch.arange(len(out), device=out.device), row.to(out.device)]
