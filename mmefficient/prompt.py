"""What outlives the prefill of a prompt, and what the host knows about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mmefficient.asking import Question
from mmefficient.masks import Segment
from mmefficient.modulation import answering
from mmefficient.packing import Units
from mmefficient.points import Scope, VisualWork
from mmefficient.tokens import Role, TokenMap

if TYPE_CHECKING:
    from mmefficient.steered import Part


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
        answers: positions from the earliest text after a last image to the end; 0 = no row has any.
        tail: int64 [B], tokens behind `last` that stay in all layers (drafts, or the filling of a bucket); None = there
            are none.
        separators: the most learned line breaks a row has, where how many stay must not be asked for; else None.
    """

    units: Mapping[Scope, Units]
    others: Sequence[int]
    question: Question
    lines: int
    images: int
    drafts: int
    last: torch.Tensor | None
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
            answers=real.shape[1] - int(after[0]) if len(after) else 0,
            tail=torch.full((len(last),), drafts, device=device) if drafts else None,
        )
