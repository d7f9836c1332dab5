"""Where a model looks: attention that visual tokens receive from the last prompt row, layer by layer.

It is read off an ordinary forward pass by methods that keep everything; no eager attention, no rows x keys matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.images import ImageSource
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from mmefficient.points import Reducer, Scope, Selection, VisualTokens
from mmefficient.vlm import VLM


@dataclass(frozen=True)
class _Watch(Reducer):
    """Keeps every token and notes the attention that each received."""

    name: ClassVar[str] = "watch"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "keep everything and note the attention received"
    needs: ClassVar[frozenset[str]] = frozenset({"own_row_attention"})
    shared_by: ClassVar[Scope] = "prompt"
    adaptive: ClassVar[bool] = True

    layer: int
    note: Callable[[torch.Tensor], None] = field(repr=False, compare=False)

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        assert tokens.attention is not None
        self.note(tokens.attention.cpu())
        place = torch.arange(tokens.valid.shape[1], device=tokens.valid.device).expand_as(tokens.valid)
        return Selection(place, tokens.valid), [unit.count for unit in tokens.units]


def attention_received(vlm: VLM, image: ImageSource, question: str) -> torch.Tensor:
    """Float32 [layers, N]: the probability that each of the N visual tokens (prompt order) receives from the last
    prompt row in each decoder layer of the model without a plan, mean over heads.

    Raises:
        InputError: as `VLM.ask`.
    """
    layers = len(adapter_for(vlm.model).layers)
    seen: list[torch.Tensor] = []
    vlm.ask(image, question, plan=Plan([_Watch(layer, seen.append) for layer in range(layers)]), max_new_tokens=1)
    return torch.cat(seen)
