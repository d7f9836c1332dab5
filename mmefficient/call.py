"""What one forward call knows; it travels through the model as a private keyword argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from mmefficient.cache import written_rows
from mmefficient.errors import InputError
from mmefficient.masks import Segment, hiding, seen_by_last
from mmefficient.modulation import Modulation
from mmefficient.offer import LAST, Asker
from mmefficient.points import Reducer
from mmefficient.prompt import PromptState
from mmefficient.reduction import Prefill
from mmefficient.tokens import images_of_rows
from mmefficient.vision import Vision


class Call:
    """One forward call of the model.

    Attributes:
        asked: by layer, the reducers that act after it and want attention from it; drafts: see `HostFacts`.
        strict: images that do not fit their rows are an error, even if the model would not notice.
        ids: int64 [B, S] of a new prompt, on the CPU; words: its rows' questions, if a matcher reads them.
        new: the call reads a new prompt; state: the prompt it reads or continues; prefill: while it reads one.
        kinds: for "image" and "video", bool [B, S] on the CPU: the placeholders of a new prompt.
        vision: the images that fill them; repeats: how often `generate` repeated the rows after encoding.
        modulated: by decoder layer, the modulations that act there; layers: the decoder's; cache: the call's.
    """

    def __init__(self, asked: Mapping[int, Sequence[Reducer]], drafts: int, strict: bool) -> None:
        self.strict = strict
        self.asked = asked
        self.state: PromptState | None = None
        self.prefill: Prefill | None = None
        self.kinds: dict[str, torch.Tensor] = {}
        self.vision: dict[str, Vision] = {}
        self.repeats: dict[str, int] = {}
        self.new = False
        self.drafts = drafts
        self.ids: torch.Tensor | None = None
        self.words: list[str] = []
        self.memo: tuple[Any, Segment, torch.Tensor | None] | None = None
        self.modulated: Mapping[int, tuple[Modulation, ...]] = {}
        self.layers: Any = ()
        self.cache: Cache | None = None
        self._stored: tuple[Any, int, torch.Tensor, list[torch.Tensor]] | None = None

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

    def asking(self, layer: int) -> Iterator[tuple[Asker, torch.Tensor | None, torch.Tensor | None]]:
        """Whose attention `layer` is to score: who asks, the rows and which of them count (`attention.row_scores`)."""
        if self.prefill is None or not self.prefill.has_visual:
            return
        reducers = self.asked.get(layer, ())
        if any("last_row_attention" in reducer.needs for reducer in reducers):
            last = self.prefill.last
            yield LAST, None if last is None else last[:, None], None
        for reducer in reducers:
            if "question_attention" in reducer.needs:
                yield reducer, *self.prefill.asking.rows(reducer, self.prefill.now)

    def asks_key_norms(self, layer: int) -> bool:
        """Whether a method that acts after `layer` ranks by the size of its keys."""
        return self.prefill is not None and any("key_norm" in r.needs for r in self.asked.get(layer, ()))

    def steers(self, layer: int) -> bool:
        """Whether attention in this layer is more than the stock function's."""
        if self.prefill is None:
            state = self.state
            return state is not None and layer in state.steered and (state.weighted or bool(self.modulated))
        busy = self.prefill.blind is not None or self.prefill.key_bias is not None
        return busy or (layer in self.modulated and self.prefill.has_visual)

    def stored(
        self, layer: int, mask: torch.Tensor | None, key: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Keys that hold something, int32 [B], and a bias [B, 1, K] that hides others, or none; shared by layers."""
        batch, keys = len(key), key.shape[2]
        if self._stored is None or self._stored[0] is not mask or self._stored[1] != keys:
            written = written_rows(self.cache, layer, keys) if mask is None else keys
            lengths = torch.full((batch,), written, dtype=torch.int32, device=key.device)
            unseen = []
            if mask is not None:
                seen = seen_by_last(mask).to(key.device).expand(batch, -1)
                unseen = [hiding(seen)]
            self._stored = (mask, keys, lengths, unseen)
        return self._stored[2], self._stored[3]

    def set_scores(self, asker: Asker, scores: torch.Tensor) -> None:
        """Hand scores to the next layer's reducers."""
        if self.prefill is not None:
            self.prefill.scores[asker] = scores
