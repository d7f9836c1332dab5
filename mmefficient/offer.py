"""What a reducer is given to decide by: the visual tokens at its site, and what else it asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mmefficient.kernels.key_scores import key_scores
from mmefficient.matchers import OWN, load
from mmefficient.packing import Units
from mmefficient.points import KEYS, MatchTokens, OwnHeads, QuestionTokens, Reducer, VisualTokens
from mmefficient.tokens import Role

if TYPE_CHECKING:
    from mmefficient.reduction import Prefill

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


@dataclass(frozen=True)
class Offer:
    """The units of one reducer's scope, between two layers of a prompt.

    Attributes:
        hidden: [B, n, D], what enters the layer.
        index: int64 [U, N], the slot of every unit's tokens; filled: bool [U, N], which entries are used.
    """

    prefill: Prefill
    units: Units
    hidden: torch.Tensor
    index: torch.Tensor
    filled: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """Batch row of every unit, int64 [U, 1]."""
        return self.units.rows[:, None]

    @property
    def columns(self) -> torch.Tensor:
        """Prompt position of every token, int64 [U, N]."""
        return self.prefill.now.columns[self.rows, self.index]

    def embeddings(self) -> VisualTokens:
        """The tokens and the question alone."""
        size = self.prefill.state.tokens.size[self.rows, self.columns]
        hidden = self.hidden[self.rows, self.index]
        return VisualTokens(self.units.units, hidden, self.filled, size, question=self.question())

    def tokens(self, reducer: Reducer, parts: Parts) -> VisualTokens:
        """What `reducer` asks for."""
        needs, tower, state = reducer.needs, self.prefill.tower, self.prefill.state
        at = self.columns
        source = state.tokens.source[self.rows, at].clamp(min=0)
        facts = mark = None
        if "tower" in needs:
            assert tower is not None
            facts = tower.tokens(source)
        if "mark" in needs:
            assert tower is not None
            assert tower.mark is not None
            mark = tower.mark.to(source.device)[source]
        match = self.match(reducer, source, parts) if "match" in needs else None
        hidden = parts.norm(self.hidden) if "final_norm" in needs else self.hidden
        attention = key_norm = None
        if "key_norm" in needs:
            key_norm = self.prefill.scores[KEYS].to(at.device)[self.rows, self.index]
        if "last_row_attention" in needs:
            attention = self.prefill.scores[LAST]
        elif "question_attention" in needs:
            attention = self.prefill.scores[reducer]
        elif "own_row_attention" in needs:
            attention = self.own_row(parts)
        if attention is not None:
            attention = attention.to(at.device)[self.rows, self.index]
        return VisualTokens(
            self.units.units,
            hidden[self.rows, self.index],
            self.filled,
            state.tokens.size[self.rows, at],
            attention=attention,
            tower=facts,
            question=self.question(hidden) if "question" in needs else None,
            own=self.own_heads(parts) if "own_heads" in needs else None,
            match=match,
            mark=mark,
            key_norm=key_norm,
        )

    def match(self, reducer: Reducer, source: torch.Tensor, parts: Parts) -> MatchTokens:
        """Patches and questions in the space of the reducer's matcher."""
        name: str = reducer.matcher  # type: ignore[attr-defined]
        if name in OWN:
            question = self.question()
            patches = self.hidden[self.rows, self.index]
            return MatchTokens.embedded(name, patches, question.hidden, question.valid)
        assert self.prefill.tower is not None
        found = self.prefill.tower.matched[name]
        texts, used = parts.texts(name, self.hidden.device)
        patches = found[source.to(found.device)].to(self.hidden.device)
        return MatchTokens(patches, texts[self.units.rows], used[self.units.rows], load(name).inverted)

    def question(self, hidden: torch.Tensor | None = None) -> QuestionTokens:
        """The question of every unit's row, in `hidden` if that is not what enters the layer."""
        hidden = self.hidden if hidden is None else hidden
        slots, used = self.prefill.asking.slots(self.prefill.now)
        at = self.rows, slots[self.units.rows]
        norms = self.prefill.scores.get(KEYS)
        norm = None if norms is None else norms.to(hidden.device)[at]
        return QuestionTokens(hidden[at], used[self.units.rows], norm)

    def own_row(self, parts: Parts) -> torch.Tensor:
        """Attention of the last prompt row in the layer about to be entered, float32 [B, n]."""
        prefill, segment = self.prefill, self.prefill.now
        assert prefill.rope is not None
        query, key, scale = parts.heads(self.hidden, prefill.rope)
        slots = torch.arange(self.hidden.shape[1], device=self.hidden.device)
        last = slots[-1:].expand(len(self.hidden)) if prefill.last is None else prefill.last.to(slots.device)
        visible = prefill.state.tokens.role.gather(1, segment.columns) != Role.PAD
        visible = visible if segment.valid is None else visible & segment.valid
        visible = visible & (slots <= last[:, None])
        query = query.gather(2, last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3]))
        return key_scores(query, key, scale=scale, mask=visible[:, None, None], heads="mean")

    def own_heads(self, parts: Parts) -> OwnHeads:
        """Queries and keys of the layer about to be entered."""
        rope = self.prefill.rope
        assert rope is not None
        still = torch.ones_like(rope[0]), torch.zeros_like(rope[1])  # a rotation by nothing
        query, key, _ = parts.heads(self.hidden, still)
        found = (query, key, parts.heads(self.hidden, rope)[1])
        return OwnHeads(*(x.transpose(1, 2)[self.rows, self.index].transpose(1, 2) for x in found))
