"""Attention changed as the papers write it, on explicit matrices, by replacing the eager attention function.

An `Edit` gets one layer's logits of one call, [B, H, Q, K] with -inf for pairs that do not exist, and facts about rows
and keys; it returns the weights and a factor on each head's output. Nothing here uses the package's executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from tests import tiny


@dataclass
class Layer:
    """One layer of one call."""

    index: int
    logits: torch.Tensor
    hidden: torch.Tensor
    value: torch.Tensor
    image: torch.Tensor  # bool [B, K]
    system: torch.Tensor
    after: torch.Tensor  # keys after the image, generated ones included
    real: torch.Tensor
    rows: torch.Tensor  # bool [B, Q], rows after the image
    prefill: bool
    memory: dict[Any, Any] = field(default_factory=dict)

    def out(self, weights: torch.Tensor) -> torch.Tensor:
        return weights @ self.value.repeat_interleave(weights.shape[1] // self.value.shape[1], 1)


Edit = Callable[[Layer], torch.Tensor]
"""Gives the heads' outputs [B, H, Q, d]."""


@contextmanager
def edited(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, edit: Edit
) -> Iterator[list[tuple[int, int]]]:
    """The model, built with eager attention, under `edit`; yields the (layer, rows) it was called for."""
    calls: list[tuple[int, int]] = []
    memory: dict[Any, Any] = {}
    hidden: dict[int, torch.Tensor] = {}
    image = ids == tiny.IMAGE
    has = image.any(1, keepdim=True)
    last_image = torch.where(image, torch.arange(ids.shape[1]), -1).amax(1, keepdim=True)
    first_image = torch.where(image, torch.arange(ids.shape[1]), ids.shape[1]).amin(1, keepdim=True)

    def note(module: Any, args: Any) -> None:
        hidden[module.self_attn.layer_idx] = args[0]

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        rows, keys = query.shape[2], key.shape[2]
        calls.append((module.layer_idx, rows))
        place = torch.arange(keys)
        real = torch.cat([mask.bool(), torch.ones(len(ids), keys - ids.shape[1], dtype=torch.bool)], 1)
        logits = query @ key.repeat_interleave(module.num_key_value_groups, 1).transpose(2, 3) * scaling
        causal = place <= place[keys - rows :, None]
        logits = logits.masked_fill(~(causal & real[:, None, None]), float("-inf"))
        is_image = torch.cat([image, image.new_zeros(len(ids), keys - ids.shape[1])], 1)
        after = has & (place > last_image) & real
        layer = Layer(
            module.layer_idx, logits, hidden[module.layer_idx], value, is_image, has & (place < first_image) & real,
            after, real, after[:, keys - rows :], rows > 1, memory,
        )  # fmt: skip
        out = edit(layer)
        return out.nan_to_num(0.0).transpose(1, 2).contiguous(), None

    handles = [layer.register_forward_pre_hook(note) for layer in model.get_decoder().layers]
    try:
        with mock.patch.object(modeling_llama, "eager_attention_forward", attention):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def plain(layer: Layer) -> torch.Tensor:
    return layer.out(layer.logits.softmax(-1))


def in_rows(layer: Layer, which: str) -> torch.Tensor:
    """bool [B, 1, Q, 1]: the rows "answer" (after the image) or "last" (the last one of the call)."""
    rows = layer.rows
    if which == "last":
        rows = torch.zeros_like(rows)
        rows[:, -1] = True
    return rows[:, None, :, None]
