"""One prompt on its way through a plan: pack the visual tokens, ask a reducer, drop or mask what leaves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mmefficient.asking import Asking
from mmefficient.errors import PlanError
from mmefficient.masks import Segment
from mmefficient.offer import Asker, Offer, Parts, Rope
from mmefficient.packing import Units
from mmefficient.points import Reducer, Scope, Selection, VisualTokens
from mmefficient.prompt import HostFacts, PromptState
from mmefficient.tokens import Role
from mmefficient.vision import Tower

if TYPE_CHECKING:
    from mmefficient.blind import Blind
    from mmefficient.slots import Slots


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
        self.last = facts.last
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
        tokens = Offer(self, units, hidden, *self._pack(units, segment.columns, segment.valid)).embeddings()
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
        tokens = Offer(self, units, hidden, index, filled).tokens(reducer, parts)
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
        if self.key_bias is not None:
            self.key_bias = self.key_bias.gather(1, order)
        tail = self.facts.tail
        self.last = None if tail is None else longest - 1 - tail
        return gather_rows(hidden, order)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B or 1, S, D], index [B, n] -> [B, n, D]."""
    index = index.to(x.device)[..., None]
    return x.expand(index.shape[0], -1, -1).gather(1, index.expand(-1, -1, x.shape[-1]))
