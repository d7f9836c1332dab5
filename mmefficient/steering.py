"""Modulations at work: what a layer's attention becomes, on the kernels, while a prompt is read and afterwards.

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
from torch.nn import functional as F

from mmefficient.cache import written_rows
from mmefficient.kernels.decode_attention import MAX_NEW, decode_attention
from mmefficient.kernels.grouped_attention import Layout, Pattern, grouped_attention, make_layout, masses, mix
from mmefficient.kernels.grouped_attention.tokens import layout_of
from mmefficient.masks import seen_by_last
from mmefficient.modulation import Change, Gain, LayerPrompt, Modulation, Rows, answering
from mmefficient.tokens import Role, TokenMap

if TYPE_CHECKING:
    from mmefficient.call import Call
    from mmefficient.reduction import Prefill

WIDEST_FIRST: tuple[Rows, ...] = ("all", "answer", "last")
KERNEL = frozenset({"bias", "map", "mix"})
ROOM = 256  # keys by which stored facts grow at a time
Stock = Callable[[], torch.Tensor]
Decide = Callable[[torch.Tensor], torch.Tensor | None]


class Aside:
    """Travels in place of a `Call` through one layer of the blind prompt.

    Attributes:
        decide: given the heads' outputs in the last prompt row, float32 [B, Hq, d], says the factor on each head.
    """

    state = None

    def __init__(self, decide: Decide | None, drafts: int) -> None:
        self.decide, self.drafts = decide, drafts

    def attended(self, out: torch.Tensor) -> torch.Tensor:
        """Note, and scale, the output of the heads, [B, n, Hq, d]."""
        gain = None if self.decide is None else self.decide(out[:, -1 - self.drafts].float())
        return out if gain is None else (out * gain[:, None, :, None]).to(out.dtype)


class KeyFacts:
    """A fact per stored key, [..., n] for the prompt's slots, and `later` for every key that comes after them."""

    def __init__(self, prompt: torch.Tensor, drafts: int, later: float = 0.0) -> None:
        self.prompt, self.later = prompt, later
        self._grown = prompt[..., : prompt.shape[-1] - drafts]  # the cache may lose drafts again

    def upto(self, keys: int) -> torch.Tensor:
        """The facts of the first `keys` keys, as a view."""
        missing = keys - self._grown.shape[-1]
        if missing > 0:
            self._grown = F.pad(self._grown, (0, missing + ROOM), value=self.later)
        return self._grown[..., :keys]


@dataclass(frozen=True, eq=False)
class Part:
    """One method's change in one layer, on `rows`; `group` [B, n] if it groups keys, `bias` [B or 1, Hq or 1, n]."""

    rows: Rows
    change: Change
    groups: int = 1
    group: KeyFacts | None = None
    bias: KeyFacts | None = None

    @property
    def in_kernel(self) -> bool:
        """Whether it needs more than a factor on the output."""
        return self.bias is not None or self.group is not None


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
    options = {"group": None, "groups": 1, "head_dim": like.shape[-1], "dtype": like.dtype} | options
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
    if call.prefill is None:
        return _later(layer, query, key, value, mask, call, scale, stock)
    slots = query.shape[2]  # a static cache offers unwritten rows
    return Reading(layer, query, key[:, :, :slots], value[:, :, :slots], call.prefill, scale).attend(call, stock)


class Reading:
    """One layer of a prompt that is being read."""

    def __init__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefill: Prefill, scale: float
    ) -> None:
        self.query, self.key, self.value, self.prefill, self.scale = query, key, value, prefill, scale
        self.prompt = LayerPrompt(layer, held(prefill), query, key, value, scale, prefill.hidden, tower=prefill.tower)

    def attend(self, call: Call, stock: Stock) -> torch.Tensor:
        """See the function `attend`; leaves in the prompt's state what decoding goes on with."""
        prefill, layer = self.prefill, self.prompt.layer
        methods = call.modulated.get(layer, ()) if prefill.has_visual else ()
        out, parts = stock(), []
        if prefill.key_bias is not None:
            parts.append(Part("all", Change(), bias=KeyFacts(prefill.key_bias[:, None], prefill.facts.drafts)))
        parts += [self.part(method) for method in methods if method.changes & KERNEL]
        for place, rows in enumerate(WIDEST_FIRST):
            if any(part.in_kernel and part.rows == rows for part in parts):
                wider = [part for part in parts if part.rows in WIDEST_FIRST[: place + 1]]
                out = self.put(out, self.kernel(wider, rows), rows)
        heads = [method for method in methods if not method.changes & KERNEL]
        blind, asks = prefill.blind, any("blind" in method.needs for method in heads)
        if blind is None or not asks:
            if blind is not None:
                blind.advance(call.layers, layer)
            parts += [self.part(method) for method in heads]
        else:
            last = out[:, -1] if prefill.last is None else pick(out, prefill.last)

            def decide(seen: torch.Tensor) -> torch.Tensor | None:
                self.prompt = replace(self.prompt, heads=last.float(), blind=seen)
                parts.extend(self.part(method) for method in heads)
                gains = [part.change.gain for part in parts if part.change.blind_too]
                return torch.stack(gains).prod(0) if gains else None  # type: ignore[arg-type]

            blind.advance(call.layers, layer, decide)
        for part in parts:
            if part.change.gain is not None:
                width = self.window(part.rows)[0]
                out = self.put(out, scaled(out[:, -width:], part.change.gain, self.query[:, :, -width:]), part.rows)
        if parts:
            prefill.state.steered[layer] = tuple(parts)
        return out

    def part(self, method: Modulation) -> Part:
        """Ask a method what it does in this layer."""
        change, drafts, group = method.change(self.prompt), self.prefill.facts.drafts, None
        if method.changes & {"map", "mix"}:

            def make() -> KeyFacts:
                return KeyFacts(method.group(self.prompt).int(), drafts, method.later)

            group = make() if method.per_layer else self.prefill.recall(method, make)
        bias = None if change.bias is None else KeyFacts(change.bias.expand(-1, -1, self.query.shape[2]), drafts)
        return Part(method.rows, change, method.groups, group, bias)

    def window(self, rows: Rows) -> tuple[int, torch.Tensor | None]:
        """How many slots at the end include all of `rows`, and which of them are meant, bool [B, width]; None = all."""
        slots, last = self.query.shape[2], self.prefill.last
        if rows == "all":
            return slots, None
        if rows == "answer":
            width = min(slots, self.prefill.facts.answers)
            acts = self.prefill.recall("answering", lambda: answering(held(self.prefill)))
            return width, acts[:, slots - width :]
        if last is None:
            return 1, None
        width = min(slots, self.prefill.behind)
        place = torch.arange(slots - width, slots, device=last.device)
        return width, (place >= last[:, None]) & (place <= last[:, None] + self.prefill.facts.drafts)

    def kernel(self, parts: Sequence[Part], rows: Rows) -> torch.Tensor:
        """Attention of the window of `rows` under `parts`, [B, width, Hq, d]."""
        width, owner = self.window(rows)[0], _owner(parts)
        options: dict[str, Any] = {"queries": width}
        if owner is not None and owner.group is not None:
            options |= {"group": owner.group.prompt, "groups": owner.groups}
        shared = owner.group if owner is not None else None
        plan = self.prefill.recall((shared, width), lambda: layout(self.prefill, self.query, **options))
        biases = [part.bias.prompt for part in parts if part.bias is not None]
        query = self.query[:, :, self.query.shape[2] - width :]
        return _run(partial(grouped_attention, query, self.key, self.value, plan, scale=self.scale), owner, biases)

    def put(self, out: torch.Tensor, new: torch.Tensor, rows: Rows) -> torch.Tensor:
        """`out` [B, n, Hq, d] with the window of `rows` exchanged for `new`, where they are meant."""
        width, acts = self.window(rows)
        if acts is not None:
            new = torch.where(acts[..., None, None], new, out[:, -width:])
        return new if width == out.shape[1] else torch.cat([out[:, :-width], new], 1)


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
    """Attention of new rows over a stored prompt."""
    assert call.state is not None
    parts, rows = call.state.steered[layer], query.shape[2]
    width = {part: min(rows, 1 + call.drafts) if part.rows == "last" else rows for part in parts}
    working = [part for part in parts if part.in_kernel]
    if working and rows <= MAX_NEW and all(width[part] == rows for part in working):
        owner, keys = _owner(working), key.shape[2]
        lengths, unseen = call.stored(layer, mask, key)
        biases = [part.bias.upto(keys) for part in working if part.bias is not None] + unseen
        options: dict[str, Any] = {}
        if owner is not None and owner.group is not None:
            options = {"group": owner.group.upto(keys), "groups": owner.groups}
        run = partial(decode_attention, query, key, value, lengths, scale=scale, **options)
        out = _run(run, owner, biases)
    else:
        out = stock()
        for size in sorted({width[part] for part in working}, reverse=True):
            new = _turn(layer, query, key, value, mask, call, scale, [p for p in working if width[p] >= size], size)
            out = new if size == rows else torch.cat([out[:, :-size], new], 1)
    for part in parts:
        if part.change.gain is not None:
            new = scaled(out[:, -width[part] :], part.change.gain, query[:, :, -width[part] :])
            out = new if width[part] == rows else torch.cat([out[:, : -width[part]], new], 1)
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
    owner = _owner(parts)
    options: dict[str, Any] = {"queries": width, "head_dim": query.shape[-1], "dtype": query.dtype}
    if owner is not None and owner.group is not None:
        options |= {"group": owner.group.upto(keys), "groups": owner.groups}
    plan = make_layout(role, **options)
    biases = [part.bias.upto(keys) for part in parts if part.bias is not None]
    return _run(partial(grouped_attention, query[:, :, -width:], key, value, plan, scale=scale), owner, biases)


def _owner(parts: Sequence[Part]) -> Part | None:
    """The part that groups the keys; the plan's rules allow one."""
    return next((part for part in parts if part.group is not None), None)


def _run(run: Callable[..., Any], owner: Part | None, biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Call a kernel with what the parts ask for; [B, R, Hq, d] in the dtype of the queries."""
    bias = torch.stack(torch.broadcast_tensors(*biases)).sum(0) if len(biases) > 1 else (*biases, None)[0]
    change = Change() if owner is None else owner.change
    query = run.args[0]  # type: ignore[attr-defined]
    found = run(bias=bias, logit_map=change.logit_map, partials=change.mix is not None)
    if change.mix is not None:
        out, lse = found
        found = mix(out, lse, change.mix(masses(lse))).to(query.dtype)
    return found.transpose(1, 2)


def scaled(out: torch.Tensor, gain: Gain, query: torch.Tensor) -> torch.Tensor:
    """Head outputs [B, R, Hq, d] times `gain`, for the rows' queries [B, Hq, R, d]."""
    factor = gain[:, None] if torch.is_tensor(gain) else gain(query).transpose(1, 2)
    return (out * factor[..., None]).to(out.dtype)


def pick(out: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Row `row[b]` of every [n, ...] in `out` [B, n, ...]."""
    return out[torch.arange(len(out), device=out.device), row.to(out.device)]
