"""Keys and values of a batch of which rows can be copied, and parts of a row given up, while it is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mmefficient.cache import store_first


@dataclass
class Stored:
    """Keys and values of a batch, and which of them its rows still see.

    Attributes:
        model: the stock model. cache: N rows of keys and values per batch row, some of them abandoned.
        seen: bool [B, N]: what later tokens see. position: int64 [B], position id of the next token.
    """

    model: Any
    cache: DynamicCache
    seen: Tensor
    position: Tensor

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any]) -> tuple[Stored, Tensor]:
        """Read prompts padded on the left; also the logits float32 [B, V] of what follows them."""
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        seen = inputs["attention_mask"].bool()
        place = (seen.long().cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=place, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cls(model, cache, seen, seen.sum(1)), out.logits[:, -1].float()

    def fork(self, rows: Tensor, seen: Tensor | None = None) -> Stored:
        """A copy of some rows (int64 [R], repeats allowed); `seen` bool [R, n] keeps the first n columns only."""
        columns = self.seen.shape[1] if seen is None else seen.shape[1]
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for index, layer in enumerate(self.cache.layers):
            store_first(cache, index, layer.keys[rows, :, :columns], layer.values[rows, :, :columns])
        if seen is None:
            return Stored(self.model, cache, self.seen[rows], self.position[rows])
        return Stored(self.model, cache, seen, seen.sum(1))

    def read(self, ids: Tensor, used: Tensor) -> Tensor:
        """Read tokens int64 [B, q], of which `used` bool [B, q] count, and return the logits float32 [B, q, V]."""
        self.seen = torch.cat([self.seen, used], 1)
        place = self.position[:, None] + used.long().cumsum(1) - 1
        self.position = self.position + used.sum(1)
        out = self.model(
            input_ids=ids,
            attention_mask=self.seen.long(),
            position_ids=place.clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits.float()

    def reorder(self, rows: Tensor) -> None:
        """Row r becomes what row `rows[r]` was."""
        self.cache.batch_select_indices(rows)
        self.seen, self.position = self.seen[rows], self.position[rows]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids int64 [R, q], zeros behind the shorter ones, and which of them are used, bool [R, q]."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    used = torch.zeros(ids.shape, dtype=torch.bool)
    for row, each in enumerate(rows):
        ids[row, : len(each)] = torch.tensor(each, dtype=torch.long)
        used[row, : len(each)] = True
    return ids.to(device), used.to(device)
