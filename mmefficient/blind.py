"""A prompt without its visual tokens, read layer by layer beside the prompt itself."""

from __future__ import annotations

import torch
from torch import nn

from mmefficient.attention import KEY
from mmefficient.masks import prefill_mask
from mmefficient.methods.reducers.exit import Exit
from mmefficient.offer import Parts
from mmefficient.prompt import PromptState
from mmefficient.reduction import Prefill
from mmefficient.steering import Aside, Decide


class Blind:
    """The same text as a prompt, its positions closed up, with nothing cached. Lives as long as one forward call."""

    def __init__(
        self,
        prefill: Prefill,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        parts: Parts,
        mrope: bool,
        flash: bool,
    ) -> None:
        """`hidden` [B, S, D], and `mask`, are what the first decoder layer is given, before any reducer acts."""
        length = hidden.shape[1]
        state = PromptState(prefill.state.plan, prefill.state.mode, prefill.state.tokens)
        twin = Prefill(state, prefill.facts, None, simulate=False)
        assert prefill.rope is not None
        twin.enter(prefill.rope, None)
        self.hidden = twin.reduce(Exit(layer=0), 0, hidden, parts)
        segment, self.last = twin.segment, twin.last
        assert segment is not None
        place = torch.arange(segment.slots, device=hidden.device).expand(len(hidden), -1)
        if segment.valid is not None:
            place = (segment.valid.long().cumsum(1) - 1).clamp(min=0)
        self.rope = parts.rotary(self.hidden, place.expand(3, -1, -1) if mrope else place)
        stock = mask if mask is None else mask[..., :length]
        self.mask = prefill_mask(stock, segment, segment.slots, flash)

    def advance(self, layers: nn.ModuleList, index: int, decide: Decide | None = None) -> None:
        """Read layer `index`, the one after the last; `decide` as in `Aside`."""
        device = next(layers[index].parameters()).device
        cos, sin = (table.to(device) for table in self.rope)
        options = {"attention_mask": self.mask, "position_embeddings": (cos, sin), "use_cache": False}
        self.hidden = layers[index](self.hidden.to(device), **options, **{KEY: Aside(decide, self.last)})
