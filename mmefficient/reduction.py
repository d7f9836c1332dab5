"""One prompt on its way through a plan: pack the visual tokens, ask a reducer, drop or mask what leaves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmefficient.asking import Asking, Question
from mmefficient.errors import PlanError
from mmefficient.kernels.key_scores import key_scores
from mmefficient.masks import Segment
from mmefficient.matchers import EMBEDDINGS, load
from mmefficient.modulation import answering
from mmefficient.packing import Units
from mmefficient.points import (
    KEYS,
    MatchTokens,
    OwnHeads,
    QuestionTokens,
    Reducer,
    Scope,
    Selection,
    VisualTokens,
    VisualWork,
)
from mmefficient.tokens import Role, TokenMap
from mmefficient.vision import Tower

if TYPE_CHECKING:
    from mmefficient.blind import Blind
    from mmefficient.rows import Slots
    from mmefficient.steering import Part

Rope = tuple[torch.Tensor, torch.Tensor]
LAST: Literal["last"] = "last"
Asker = Literal["last", "keys"] | Reducer
"""Whose attention a score is: the last prompt row's, or the question rows that a reducer chose. KEYS: sizes of keys."""


@dataclass(frozen=True)
class Parts:
    """What the model lends to a reduction.

    Attributes:
        project: the projector, [..., Dv] -> [..., D].
        rotary: the decoder's rotary embedding, of hidden states and position ids.
        heads: query [B, H, n, d], key [B, G, n, d] and the factor on their products in the layer about to be entered,
            of hidden states and rope.
        norm: the decoder's last norm.
        texts: the rows' questions in the space of a matcher, see `matchers.Matcher.texts`; of its name and a device.
    """

    project: Callable[[torch.Tensor], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor], Rope]
    heads: Callable[[torch.Tensor, Rope], tuple[torch.Tensor, torch.Tensor, float]]
    texts: Callable[[str, torch.device], tuple[torch.Tensor, torch.Tensor]]
    norm: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class PromptState:
    """What outlives the prefill; rides on the cache.

    Attributes:
        plan, mode: under which the prompt was read.
        tokens: the map, on the model's device.
        segments: by decoder layer, what it holds; layers that hold the whole prompt are absent.
        weighted: keys count by size; `steered` has the bias.
        shift: int64 [B, 1], how far the position ids of later tokens move down; None = not at all.
        steered: by decoder layer, what modulations do to later rows.
        pictures: for a view, until it has read the prompt too.
        works: by decoder layer, what it computes for visual rows; layers that compute everything are absent.
    """

    plan: str
    mode: str
    tokens: TokenMap
    segments: dict[int, Segment] = field(default_factory=dict)
    shift: torch.Tensor | None = None
    steered: dict[int, tuple[Part, ...]] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = False
    works: Mapping[int, VisualWork] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions in the prompt, S."""
        return self.tokens.role.shape[1]


@dataclass(frozen=True)
class HostFacts:
    """What the host knows about a prompt from its token ids alone, so that no layer has to ask the device.

    Attributes:
        units: for every scope a plan uses, the units as the prompt came.
        others: per row, tokens that are neither padding, separators nor visual.
        question: the text that asks about the images.
        lines: one more than the largest line number; 0 = the prompt has no separators.
        images: the most images a row has.
        drafts: tokens at the end that assisted decoding proposes; they are read with the prompt but are none of it.
        last: int64 [B], the last prompt token of each row; None = the last position everywhere.
        behind: positions from the earliest of those to the end.
        answers: positions from the earliest text after a last image to the end; 0 = no row has any.
        tail: int64 [B], tokens behind it that stay in all layers (drafts, or the filling of a bucket); None = no row
            has any.
        separators: the most learned line breaks a row has, where how many stay must not be asked for; else None.
    """

    units: Mapping[Scope, Units]
    others: Sequence[int]
    question: Question
    lines: int
    images: int
    drafts: int
    last: torch.Tensor | None
    behind: int
    answers: int
    tail: torch.Tensor | None = None
    separators: int | None = None

    @classmethod
    def of(cls, tokens: TokenMap, scopes: set[Scope], drafts: int, device: torch.device) -> HostFacts:
        """Facts of a prompt; `tokens` lives on the CPU, tensors of the result on `device`."""
        others = ((tokens.role == Role.SYSTEM) | (tokens.role == Role.QUESTION)).sum(1).tolist()
        separators = (tokens.role == Role.SEPARATOR).any()
        real = tokens.role != Role.PAD
        last = (real.long() * torch.arange(real.shape[1])).argmax(1) - drafts
        after = answering(tokens).any(0).nonzero()
        return cls(
            units={scope: Units.of(tokens, scope, device) for scope in scopes},
            others=others,
            question=Question.of(tokens, drafts, device),
            lines=int(tokens.line.max()) + 1 if separators else 0,
            images=int(tokens.image.max()) + 1,
            drafts=drafts,
            last=None if bool((last == real.shape[1] - 1).all()) else last.to(device),
            behind=real.shape[1] - int(last.min()),
            answers=real.shape[1] - int(after[0]) if len(after) else 0,
            tail=torch.full((len(last),), drafts, device=device) if drafts else None,
        )


class Prefill:
    """The rows of one prompt between two decoder layers. Lives as long as one forward call.

    Attributes:
        segment: which prompt positions the n rows hold; None = the prompt as it came.
        stored: the same less the drafts, which the cache may lose again.
        rope: cosine and sine of the rows, [B or 1, n, d] each; position: int64 [B or 1, n] or None, as layers get it.
        scores: by who asked, float32 [B, >= n], attention in the layer before.
        asking: the question rows, and whose attention reducers want.
        hidden: [B, n, D], what enters the current layer.
        key_bias: float32 [B, n] or None, added to the logits of every key from this layer on.
        blind: the prompt without its visual tokens, if a method asked for it.
        behind: slots from the earliest last prompt token to the end.
        slots: where text and visual rows are in the segment; None = nobody asked.
    """

    def __init__(self, state: PromptState, facts: HostFacts, tower: Tower | None, simulate: bool) -> None:
        self.state, self.facts, self.tower, self.simulate = state, facts, tower, simulate
        self.segment: Segment | None = None
        self.stored: Segment | None = None
        self.rope: Rope | None = None
        self.position: torch.Tensor | None = None
        self.scores: dict[Asker, torch.Tensor] = {}
        self.asking = Asking(facts.question)
        self.slots: Slots | None = None
        self._whole: Segment | None = None
        self.last, self.behind = facts.last, facts.behind
        self.hidden: torch.Tensor | None = None
        self.key_bias: torch.Tensor | None = None
        self.blind: Blind | None = None
        self._memo: dict[Hashable, Any] = {}
        self.units: dict[Scope, Units] = dict(facts.units)

    @property
    def has_visual(self) -> bool:
        """Whether any row still holds visual tokens."""
        return any(unit.count for units in self.units.values() for unit in units.units)

    def enter(self, rope: Rope, position: torch.Tensor | None) -> None:
        """Take the rotary tables of the whole prompt, unless rows have already left."""
        if self.segment is None:
            self.rope, self.position = rope, position

    def choose_raters(self, reducer: Reducer, hidden: torch.Tensor) -> None:
        """Let `reducer` choose the question rows whose attention it wants; `hidden` [B, n, D] at the first layer."""
        units, segment = self._units("prompt"), self.now
        index, filled = self._pack(units, segment.columns, segment.valid)
        rows = units.rows[:, None]
        size = self.state.tokens.size[rows, segment.columns[rows, index]]
        question = self._asked(units, hidden, segment)
        tokens = VisualTokens(units.units, hidden[rows, index], filled, size, question=question)
        self.asking.choose(reducer, units.rows, reducer.raters(tokens), segment)

    @property
    def now(self) -> Segment:
        """What the rows are, also while they are the whole prompt."""
        if self.segment is not None:
            return self.segment
        if self._whole is None:
            role = self.state.tokens.role
            everything = torch.arange(self.state.length, device=role.device).expand_as(role)
            self._whole = Segment(everything, None, self.state.length)
        return self._whole

    def reduce(self, reducer: Reducer, layer: int, hidden: torch.Tensor, parts: Parts) -> torch.Tensor:
        """Let `reducer` act on `hidden` [B, n, D] at the input of `layer`; returns the rows that remain.

        Raises:
            BudgetError: more tokens are to be kept than a unit has.
            PlanError: the reducer needs complete grids and a unit has none.
        """
        hidden = hidden.to(self.state.tokens.role.device)  # layers may be spread over several devices
        units = self._units(reducer.scope)
        if "full_grid" in reducer.needs:
            for unit in units.units:
                if not unit.grids:
                    raise PlanError(f"{reducer.name} needs complete grids; row {unit.row} has none in {unit.label}.")
        held = [unit.count for unit in units.units]
        # a unit that an adaptive method has emptied has nothing to be reduced
        planned = None if reducer.adaptive else [reducer.budget(unit) if unit.count else 0 for unit in units.units]
        if planned == held:
            return hidden
        batch, slots = hidden.shape[:2]
        segment = self.now
        columns, valid = segment.columns, segment.valid
        index, filled = self._pack(units, columns, valid)
        tokens = self._view(reducer, units, hidden, segment, index, filled, parts)
        if planned is None:
            selection, counts = reducer.choose(tokens)
            if counts == held:
                return hidden
        else:
            selection, counts = reducer.reduce(tokens, planned), planned
        kept = index.gather(1, selection.index)
        places = (units.rows[:, None] * slots + kept).flatten()
        if len(set(counts)) > 1:  # flat numbers of the valid entries, from counts the host knows
            most = max(counts)
            flat = [unit * most + i for unit, count in enumerate(counts) for i in range(count)]
            chosen = torch.tensor(flat, device=hidden.device)
            places = places[chosen]
        else:
            chosen = None
        if selection.mix is not None:
            hidden = self._merge(reducer, hidden, tokens, selection, places, chosen, columns, parts.project)
            self._carry(units, tokens, selection, columns[units.rows[:, None], index])
        keep = torch.zeros(batch * slots, dtype=torch.bool, device=hidden.device).index_fill_(0, places, True)
        keep = keep.view(batch, slots)
        role = self.state.tokens.role.gather(1, columns)
        alive = role != Role.PAD if valid is None else valid & (role != Role.PAD)
        keep |= alive & ((role == Role.SYSTEM) | (role == Role.QUESTION))
        if self.facts.lines:
            keep |= alive & (role == Role.SEPARATOR) & self._lines_alive(keep & (role == Role.IMAGE), columns)
        self._bury(alive & ~keep, columns, layer)
        if reducer.position_policy == "compact":
            self._compact(alive & ~keep, columns, hidden, parts.rotary)
        self.units = {reducer.scope: units.with_counts(counts)}
        if self.simulate:
            self._hold(Segment(columns, keep, segment.length))
        else:
            hidden = self._repack(hidden, keep, columns, self._row_counts(units, counts, keep), segment.length)
        if reducer.weighted:
            self.key_bias = self.state.tokens.size.gather(1, self.now.columns).log()
            self.state.weighted = True
        return hidden

    def recall(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` makes, kept for all layers that hold the same slots."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _hold(self, segment: Segment) -> None:
        self._memo.clear()
        self.segment, self.stored = segment, segment.without_end(self.facts.drafts)

    def _units(self, scope: Scope) -> Units:
        """The units of `scope` as they are now."""
        if scope not in self.units:
            units = self.facts.units[scope]
            assert self.segment is not None
            now = units.members(self.segment.columns, self.segment.valid).sum(1).tolist()
            self.units[scope] = units.with_counts(now)
        return self.units[scope]

    def _pack(
        self, units: Units, columns: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot of every unit's tokens, int64 [U, N], and which entries are used, bool [U, N]."""
        held = torch.tensor([unit.count for unit in units.units], device=columns.device)[:, None]
        most = max(unit.count for unit in units.units)
        members = units.members(columns, valid)
        index = members.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        return index, torch.arange(most, device=columns.device) < held

    def _view(
        self,
        reducer: Reducer,
        units: Units,
        hidden: torch.Tensor,
        segment: Segment,
        index: torch.Tensor,
        filled: torch.Tensor,
        parts: Parts,
    ) -> VisualTokens:
        rows = units.rows[:, None]
        at = segment.columns[rows, index]
        tower = match = mark = None
        source = self.state.tokens.source[rows, at].clamp(min=0)
        if "tower" in reducer.needs:
            assert self.tower is not None
            tower = self.tower.tokens(source)
        if "match" in reducer.needs:
            match = self._match(reducer, units, hidden, segment, index, source, parts)
        if "mark" in reducer.needs:
            assert self.tower is not None
            assert self.tower.mark is not None
            mark = self.tower.mark.to(source.device)[source]
        if "final_norm" in reducer.needs:
            hidden = parts.norm(hidden)
        attention = question = own = key_norm = None
        if "key_norm" in reducer.needs:
            key_norm = self.scores[KEYS].to(at.device)[rows, index]
        if "last_row_attention" in reducer.needs:
            attention = self.scores[LAST]
        elif "question_attention" in reducer.needs:
            attention = self.scores[reducer]
        elif "own_row_attention" in reducer.needs:
            attention = self._own_row(hidden, segment, parts)
        if attention is not None:
            attention = attention.to(at.device)[rows, index]
        if "question" in reducer.needs:
            question = self._asked(units, hidden, segment)
        if "own_heads" in reducer.needs:
            own = self._own_heads(hidden, rows, index, parts)
        size = self.state.tokens.size[rows, at]
        return VisualTokens(
            units.units, hidden[rows, index], filled, size, attention, tower, question, own, match, mark, key_norm
        )

    def _match(
        self,
        reducer: Reducer,
        units: Units,
        hidden: torch.Tensor,
        segment: Segment,
        index: torch.Tensor,
        source: torch.Tensor,
        parts: Parts,
    ) -> MatchTokens:
        """Patches and questions in the space of the reducer's matcher."""
        name: str = reducer.matcher  # type: ignore[attr-defined]
        if name == EMBEDDINGS:
            question = self._asked(units, hidden, segment)
            patches = hidden[units.rows[:, None], index]
            return MatchTokens(patches.float(), question.hidden.float(), question.valid, inverted=False)
        assert self.tower is not None
        found = self.tower.matched[name]
        texts, used = parts.texts(name, hidden.device)
        patches = found[source.to(found.device)].to(hidden.device)
        return MatchTokens(patches, texts[units.rows], used[units.rows], load(name).inverted)

    def _asked(self, units: Units, hidden: torch.Tensor, segment: Segment) -> QuestionTokens:
        slots, used = self.asking.slots(segment)
        at = units.rows[:, None], slots[units.rows]
        norms = self.scores.get(KEYS)
        return QuestionTokens(hidden[at], used[units.rows], None if norms is None else norms.to(hidden.device)[at])

    def _own_row(self, hidden: torch.Tensor, segment: Segment, parts: Parts) -> torch.Tensor:
        """Attention of the last prompt row in the layer about to be entered, float32 [B, n]."""
        assert self.rope is not None
        query, key, scale = parts.heads(hidden, self.rope)
        slots = torch.arange(hidden.shape[1], device=hidden.device)
        last = slots[-1:].expand(len(hidden)) if self.last is None else self.last.to(hidden.device)
        visible = self.state.tokens.role.gather(1, segment.columns) != Role.PAD
        visible = visible if segment.valid is None else visible & segment.valid
        visible = visible & (slots <= last[:, None])
        query = query.gather(2, last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3]))
        return key_scores(query, key, scale=scale, mask=visible[:, None, None], heads="mean")

    def _own_heads(self, hidden: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, parts: Parts) -> OwnHeads:
        assert self.rope is not None
        still = torch.ones_like(self.rope[0]), torch.zeros_like(self.rope[1])  # a rotation by nothing
        query, key, _ = parts.heads(hidden, still)
        found = (query, key, parts.heads(hidden, self.rope)[1])
        return OwnHeads(*(x.transpose(1, 2)[rows, index].transpose(1, 2) for x in found))

    def _merge(
        self,
        reducer: Reducer,
        hidden: torch.Tensor,
        tokens: VisualTokens,
        selection: Selection,
        places: torch.Tensor,
        chosen: torch.Tensor | None,
        columns: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Write the mixed features into the rows `places`, and add up the sizes."""
        assert selection.mix is not None
        mix = selection.mix.float().masked_fill(~tokens.valid[:, None], 0.0)
        features = tokens.tower.features if reducer.space == "tower" and tokens.tower is not None else tokens.hidden
        mixed = (mix @ features.float().masked_fill(~tokens.valid[..., None], 0.0)).to(features.dtype)
        if reducer.space == "tower":
            mixed = project(mixed)
        mixed = mixed.flatten(0, 1).to(hidden)
        # a token's size is shared out in proportion to where its features went
        mix = mix * selection.valid[..., None]
        sizes = ((mix / mix.sum(1, keepdim=True).clamp(min=1e-12)) @ tokens.size[..., None]).flatten()
        if chosen is not None:
            mixed, sizes = mixed[chosen], sizes[chosen]
        batch, slots, width = hidden.shape
        size, length = self.state.tokens.size, self.state.length
        where = (places // slots) * length + columns.flatten()[places]
        self.state.tokens = self.state.tokens.replace(size=size.flatten().index_copy(0, where, sizes).view_as(size))
        return hidden.reshape(-1, width).index_copy(0, places, mixed).view(batch, slots, width)

    def _carry(self, units: Units, tokens: VisualTokens, selection: Selection, column: torch.Tensor) -> None:
        """Note which token carries on the features of those that were merged, at prompt positions `column` [U, N]."""
        assert selection.mix is not None
        share = selection.mix.float() * selection.valid[..., None]
        itself = selection.valid[..., None] * (2 * share.amax() + 1)  # a token that stays carries on its own
        share = share.scatter_add(2, selection.index[..., None], itself)
        target = column.gather(1, selection.index.gather(1, share.argmax(1)))
        target = torch.where(share.amax(1) > 0, target, column)
        batch, length = self.state.tokens.role.shape
        first = units.rows[:, None] * length
        # what is in no unit goes behind the end, so that it overwrites nothing
        where = torch.where(tokens.valid, first + column, batch * length)
        whole = torch.arange(batch * length + 1, device=column.device)
        whole = whole.scatter(0, where.flatten(), (first + target).flatten())[:-1].view(batch, length)
        carried = self.state.tokens.carried_by
        step = whole - torch.arange(batch, device=column.device)[:, None] * length
        self.state.tokens = self.state.tokens.replace(carried_by=step.gather(1, carried))

    def _lines_alive(self, kept: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """bool [B, n]: whether a visual token in `kept` lies on the slot's line."""
        tokens, lines = self.state.tokens, self.facts.lines
        line = tokens.line.gather(1, columns)
        key = torch.where(line < 0, 0, tokens.image.gather(1, columns) * lines + line + 1)
        found = torch.zeros(key.shape[0], self.facts.images * lines + 1, dtype=torch.long, device=key.device)
        return found.scatter_add_(1, key, kept.long()).gather(1, key) > 0

    def _bury(self, dead: torch.Tensor, columns: torch.Tensor, layer: int) -> None:
        until = self.state.tokens.lives_until
        now = torch.where(dead, layer, until.gather(1, columns)).to(until.dtype)
        self.state.tokens = self.state.tokens.replace(lives_until=until.scatter(1, columns, now))

    def _compact(
        self,
        dead: torch.Tensor,
        columns: torch.Tensor,
        hidden: torch.Tensor,
        rotary: Callable[[torch.Tensor, torch.Tensor], Rope],
    ) -> None:
        """Close the gaps in the position ids."""
        before = dead.long().cumsum(1)
        position = self.state.tokens.position[0]
        now = position.gather(1, columns) - before
        self.state.tokens = self.state.tokens.replace(position=position.scatter(1, columns, now)[None])
        self.state.shift = before[:, -1:] if self.state.shift is None else self.state.shift + before[:, -1:]
        self.rope, self.position = rotary(hidden, now), now if self.position is not None else None

    def _row_counts(self, units: Units, counts: Sequence[int], keep: torch.Tensor) -> list[int]:
        """Tokens each row keeps, or a bound; with separators only the device knows how many of those stay."""
        if self.facts.lines and self.facts.separators is None:
            return keep.sum(1).tolist()
        rows = list(self.facts.others)
        for unit, count in zip(units.units, counts, strict=True):
            rows[unit.row] += count
        if not self.facts.lines:
            return rows
        assert self.facts.separators is not None
        return [min(row + self.facts.separators, keep.shape[1]) for row in rows]

    def _repack(
        self, hidden: torch.Tensor, keep: torch.Tensor, columns: torch.Tensor, rows: Sequence[int], length: int
    ) -> torch.Tensor:
        """Move the kept rows to the right end; shorter rows are filled up with rows that take no part."""
        assert self.rope is not None
        longest = max(rows)
        exact = not (self.facts.lines and self.facts.separators is not None)
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - longest :]
        valid = None if min(rows) == longest and exact else keep.gather(1, order)
        self._hold(Segment(columns.gather(1, order), valid, length))
        self.rope = (gather_rows(self.rope[0], order), gather_rows(self.rope[1], order))
        if self.position is not None:
            self.position = self.position.expand(len(order), -1).gather(1, order)
        for asker, scores in self.scores.items():
            self.scores[asker] = scores.to(order.device).gather(1, order)
        self.behind = 1 + self.facts.drafts
        if self.key_bias is not None:
            self.key_bias = self.key_bias.gather(1, order)
        tail = self.facts.tail
        self.last = None if tail is None else longest - 1 - tail
        return gather_rows(hidden, order)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B or 1, S, D], index [B, n] -> [B, n, D]."""
    index = index.to(x.device)[..., None]
    return x.expand(index.shape[0], -1, -1).gather(1, index.expand(-1, -1, x.shape[-1]))
