"""ACT (Yu et al., ICML 2024): attention on sinks other than the first goes to the tokens that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from mmefficient.errors import PlanError
from mmefficient.kernels.key_scores import key_scores
from mmefficient.modulation import Change, LayerPrompt, Mix, Modulation, Rows
from mmefficient.points import about
from mmefficient.tokens import Role

Kind = Literal["all", "visual", "text"]


@dataclass(frozen=True)
class ACT(Modulation):
    """Each head's sinks, found while the prompt is read, keep the share `beta` of its attention; the rest gets more."""

    name: ClassVar[str] = "act"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15765"
    summary: ClassVar[str] = "damp every head's attention sinks but the first, in favour of all other tokens"
    changes: ClassVar[frozenset[str]] = frozenset({"mix"})
    rows: ClassVar[Rows] = "all"
    groups: ClassVar[int] = 2
    per_layer: ClassVar[bool] = True
    per_head: ClassVar[bool] = True

    beta: float = field(default=0.4, metadata=about("share of their attention that sinks keep"))
    theta: float = field(default=0.1, metadata=about("attention received, mean over the rows that see it, of a sink"))
    sinks: Kind = field(default="all", metadata=about("which sinks: 'all', 'visual' or 'text'", quiet=True))
    heads: tuple[tuple[int, int], ...] = field(
        default=(), metadata=about("(layer, head) pairs it acts in; none = every head of layers 2 to the last but one")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise PlanError(f"act: beta={self.beta} is outside [0, 1]; it is the share that sinks keep.")

    def layers(self, count: int) -> Sequence[int]:
        return sorted({layer for layer, _ in self.heads}) if self.heads else range(min(2, count - 1), max(1, count - 1))

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        tokens = prompt.tokens
        real = tokens.role != Role.PAD
        asks = real if prompt.tail is None else real & ~prompt.tail
        place = torch.arange(real.shape[1], device=real.device)
        last = torch.where(asks, place, -1)
        mask = real[:, None, None]
        received = key_scores(prompt.query, prompt.key, scale=prompt.scale, mask=mask, last=last, rows="sum")
        seen = asks.flip(1).cumsum(1).flip(1).clamp(min=1)  # rows that can see a token: its own and later ones
        sink = (received / seen[:, None] > self.theta) & real[:, None]
        sink = sink & (sink.cumsum(2) > 1)
        if self.sinks != "all":
            sink = sink & (tokens.visual if self.sinks == "visual" else ~tokens.visual)[:, None]
        return sink

    def change(self, prompt: LayerPrompt) -> Change:
        where, count = prompt.has_image[:, None], prompt.query.shape[1]
        if self.heads:
            mine = [head for layer, head in self.heads if layer == prompt.layer]
            if not 0 <= min(mine) <= max(mine) < count:
                raise PlanError(f"act: layer {prompt.layer} has heads 0 to {count - 1}, not {mine}.")
            listed = torch.zeros(count, dtype=torch.bool)
            listed[mine] = True
            where = where & listed.to(where.device)
        # of the others and of the sinks; rows are what they become
        return Change(mix=Mix.of(where, ((1.0, 1 - self.beta), (0.0, self.beta)), ((0.0, 0.0, 0.0),)))
