"""Logits with the image withdrawn at every layer in turn, at the price of little more than one forward.

What `exit(layer=K)` computes differs from the stock forward in text rows of layers K and later alone. So the stock
forward is run once, and its text rows go on by themselves from the input of each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mmefficient.masks import Segment, prefill_mask
from mmefficient.models import adapter_for
from mmefficient.reduction import gather_rows


class Withdrawal:
    """One stock forward of prompts with equally many visual tokens each, and what follows from it.

    Attributes:
        full: its logits in the last `width` rows, [B, width, V].
        states: by layer, what enters it, [B, S, D].
    """

    @torch.no_grad()
    def __init__(self, model: Any, inputs: Mapping[str, torch.Tensor], width: int) -> None:
        self.model, self.width = model, width
        adapter = adapter_for(model)
        self.decoder, self.layers = adapter.decoder, adapter.layers
        self.states: dict[int, torch.Tensor] = {}
        self.given: dict[str, Any] = {}
        handles = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self.layers]
        try:
            self.full = model(**inputs, use_cache=False, logits_to_keep=width).logits
        finally:
            for handle in handles:
                handle.remove()
        image = inputs["input_ids"] == adapter.placeholders["image"]
        count = image.shape[1] - int(image[0].sum())
        columns = image.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        self.text = Segment(columns, None, image.shape[1])

    def _note(self, layer: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        self.states[layer.self_attn.layer_idx], self.given = args[0], kwargs

    @torch.no_grad()
    def shorter(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(K, logits [B, width, V]) with the image withdrawn at the input of layer K, for K = 1 .. L-1."""
        columns, slots = self.text.columns, self.text.slots
        flash = "flash" in self.decoder.config._attn_implementation
        mask = prefill_mask(self.given.get("attention_mask"), self.text, slots, flash)
        rope = tuple(gather_rows(x, columns) for x in self.given["position_embeddings"])
        given = {**self.given, "attention_mask": mask, "position_embeddings": rope, "position_ids": None}
        for first in range(1, len(self.layers)):
            hidden = gather_rows(self.states[first], columns)
            for layer in self.layers[first:]:
                hidden = layer(hidden, **given)
            yield first, self.model.get_output_embeddings()(self.decoder.norm(hidden[:, -self.width :]))
