"""AD-HH (Yang et al., ICLR 2025): hallucination heads lose their attention to text when there is much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from mmefficient.errors import PlanError
from mmefficient.modulation import Change, LayerPrompt, Mix, Modulation, Rows, answering
from mmefficient.points import Method, about
from mmefficient.profiles import Checkpoint

Heads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ADHH(Modulation):
    """In the listed heads, attention on the text after the image is dropped where it is at least `theta` in all."""

    name: ClassVar[str] = "adhh"
    paper: ClassVar[str] = "https://github.com/TianyunYoung/Hallucination-Attribution"
    summary: ClassVar[str] = "cut the attention of hallucination heads to the text after the image"
    changes: ClassVar[frozenset[str]] = frozenset({"mix"})
    rows: ClassVar[Rows] = "last"
    groups: ClassVar[int] = 2
    later: ClassVar[int] = 1

    theta: float = field(default=0.4, metadata=about("attention on text from which on it is cut"))
    heads: Heads | Literal["auto"] = field(
        default="auto", metadata=about("(layer, head) pairs; auto = the checkpoint's profile")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != "auto" and min((min(pair) for pair in self.heads), default=-1) < 0:
            raise PlanError(f"adhh: heads={self.heads!r} holds no (layer, head) pairs counted from 0.")

    @property
    def pairs(self) -> Heads:
        """The listed heads; none while `stages` has not looked them up."""
        return () if isinstance(self.heads, str) else self.heads

    def stages(self, checkpoint: Checkpoint) -> tuple[Method, ...]:
        if self.pairs:
            return (self,)
        found = checkpoint.profile(self.name).facts["heads"]
        return (ADHH(self.theta, tuple((layer, head) for layer, head in found)),)

    def layers(self, count: int) -> Sequence[int]:
        return sorted({layer for layer, _ in self.pairs})

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        return answering(prompt.tokens)

    def change(self, prompt: LayerPrompt) -> Change:
        count = prompt.query.shape[1]
        mine = [head for layer, head in self.pairs if layer == prompt.layer]
        if max(mine) >= count:
            raise PlanError(f"adhh: layer {prompt.layer} has no head {max(mine)}; the model has {count} heads.")
        listed = torch.zeros(count, dtype=torch.bool)
        listed[mine] = True
        where = listed.to(prompt.query.device) & prompt.has_image[:, None]
        # of the rest and of the text after the image, which is cut and not made up for
        return Change(mix=Mix.of(where, ((1.0, 0.0), (0.0, 0.0)), ((0.0, 1.0, self.theta),)))
