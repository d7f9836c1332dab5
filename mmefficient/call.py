"""What one forward call knows; it travels through the model as a private keyword argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmefficient.errors import InputError
from mmefficient.masks import Segment
from mmefficient.reduction import Prefill, PromptState
from mmefficient.tokens import images_of_rows
from mmefficient.vision import Vision


class Call:
    """One forward call of the model.

    Attributes:
        scored: layers whose attention scores the last prompt row; drafts: see `HostFacts`.
        strict: images that do not fit their rows are an error, even if the model would not notice.
        new: the call reads a new prompt; state: the prompt it reads or continues; prefill: while it reads one.
        kinds: for "image" and "video", bool [B, S] on the CPU: the placeholders of a new prompt.
        vision: the images that fill them; repeats: how often `generate` repeated the rows after encoding.
    """

    def __init__(self, scored: frozenset[int], drafts: int, strict: bool) -> None:
        self.strict = strict
        self.scored = scored
        self.state: PromptState | None = None
        self.prefill: Prefill | None = None
        self.kinds: dict[str, torch.Tensor] = {}
        self.vision: dict[str, Vision] = {}
        self.repeats: dict[str, int] = {}
        self.new = False
        self.drafts = drafts
        self.memo: tuple[Any, Segment, torch.Tensor | None] | None = None

    def receive(self, kind: str, vision: Vision) -> None:
        """Take the images of the prompt; raises InputError when they do not fit the placeholders."""
        placeholders = self.kinds[kind].sum(1).tolist()
        lengths = [len(layout) for layout in vision.layouts]
        try:
            images_of_rows(placeholders, lengths, kind, self.repeats.get(kind, 1))
        except InputError:
            # the model only compares totals; without methods it must run whatever it runs without a plan
            if self.strict or sum(placeholders) != sum(lengths) * self.repeats.get(kind, 1):
                raise
        else:
            self.vision[kind] = vision

    def mask(self, stock: Any, segment: Segment, make: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """The mask that `make` makes; layers that hold the same segment share it."""
        if self.memo is None or self.memo[0] is not stock or self.memo[1] is not segment:
            self.memo = (stock, segment, make())
        return self.memo[2]

    def wants_scores(self, layer: int) -> bool:
        """Whether the attention function should score the last prompt row in this layer."""
        return self.prefill is not None and layer in self.scored

    @property
    def last(self) -> torch.Tensor | None:
        """See `attention.last_row_scores`."""
        return None if self.prefill is None else self.prefill.last

    def set_scores(self, scores: torch.Tensor) -> None:
        """Hand scores to the next layer's reducers."""
        if self.prefill is not None:
            self.prefill.scores = scores
