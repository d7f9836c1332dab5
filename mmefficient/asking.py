"""The rows of a prompt that ask about its images: where they are now, and which of them a reducer listens to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmefficient.masks import Segment
from mmefficient.points import Reducer
from mmefficient.tokens import Role, TokenMap


@dataclass(frozen=True)
class Question:
    """The text after each row's last visual token, drafts left out.

    Attributes:
        at: bool [B, S]; longest: the most such tokens a row has, known on the host.
    """

    at: torch.Tensor
    longest: int

    @classmethod
    def of(cls, tokens: TokenMap, drafts: int, device: torch.device) -> Question:
        """Find it; `tokens` lives on the CPU, the result's tensor on `device`."""
        at = question_at(tokens, drafts)
        return cls(at.to(device), int(at.sum(1).max()))


def question_at(tokens: TokenMap, drafts: int) -> torch.Tensor:
    """bool [B, S]: the text after each row's last visual token, drafts left out."""
    later = tokens.visual.long().flip(1).cumsum(1).flip(1) == 0  # no visual token from here on
    column = torch.arange(tokens.role.shape[1], device=later.device)
    return (tokens.role == Role.QUESTION) & later & (column < len(column) - drafts)


class Asking:
    """The question's slots between two decoder layers, and the raters of every reducer."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.raters: dict[Reducer, torch.Tensor] = {}
        self._memo: tuple[Segment, torch.Tensor, torch.Tensor] | None = None

    def slots(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of every row's question in prompt order, int64 [B, Q], and which entries are used, bool [B, Q]."""
        if self._memo is None or self._memo[0] is not segment:
            here = self.question.at.gather(1, segment.columns)
            here = here if segment.valid is None else here & segment.valid
            index = here.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.question.longest]
            self._memo = segment, index, here.gather(1, index)
        return self._memo[1], self._memo[2]

    def choose(self, reducer: Reducer, rows: torch.Tensor, chosen: torch.Tensor, segment: Segment) -> None:
        """Note which question rows `reducer` listens to: `chosen` bool [U, Q], for the batch rows `rows` [U]."""
        index, used = self.slots(segment)
        columns = segment.columns[rows[:, None], index[rows]]
        found = torch.zeros_like(self.question.at, dtype=torch.long)
        found.index_put_((rows[:, None].expand_as(columns), columns), (chosen & used[rows]).long(), accumulate=True)
        self.raters[reducer] = found > 0

    def rows(self, reducer: Reducer, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the question, int64 [B, Q], and which of them `reducer` listens to, bool [B, Q]."""
        index, used = self.slots(segment)
        return index, used & self.raters[reducer].gather(1, segment.columns).gather(1, index)
