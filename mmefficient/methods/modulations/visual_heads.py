"""YOPO's head pruning (Zhang et al., 2024): chosen heads see the image, the others of their layers do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from mmefficient.errors import PlanError
from mmefficient.modulation import Change, LayerPrompt, Mix, Modulation, Rows
from mmefficient.points import Method, about
from mmefficient.profiles import Checkpoint


@dataclass(frozen=True)
class VisualHeads(Method):
    """Two readings of "does not see": as released, the share of attention that visual tokens would get is lost; or
    their logits are -inf, and the rest of the softmax sums to one.
    """

    name: ClassVar[str] = "visual_heads"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.06169"
    point: ClassVar[str] = "modulation"
    summary: ClassVar[str] = "chosen heads see the image, the others of their layers do not (YOPO; trained)"
    many_turns: ClassVar[bool] = False

    mask: tuple[tuple[int, int], ...] = field(
        metadata=about("heads that see the image, as (layer, head); layers that are not named keep all")
    )
    form: Literal["unnormalised", "renormalised"] = field(
        default="unnormalised",
        metadata=about("the others' attention: 'unnormalised' or 'renormalised'"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min((min(pair) for pair in self.mask), default=-1) < 0:
            raise PlanError(f"visual_heads: mask={self.mask!r} is no list of (layer, head), such as ((8, 0), (8, 3)).")
        object.__setattr__(self, "mask", tuple(sorted(set(self.mask))))

    def stages(self, checkpoint: Checkpoint) -> tuple[Method, ...]:
        kind = _Unnormalised if self.form == "unnormalised" else _Renormalised
        return tuple(kind(layer, tuple(head for at, head in self.mask if at == layer)) for layer in dict(self.mask))


@dataclass(frozen=True)
class _Stage(Modulation):
    """One layer, and its heads that see the image."""

    name: ClassVar[str] = "visual_heads"
    paper: ClassVar[str] = VisualHeads.paper
    rows: ClassVar[Rows] = "all"

    layer: int
    heads: tuple[int, ...]

    def layers(self, count: int) -> Sequence[int]:
        return (self.layer,)

    def blind(self, prompt: LayerPrompt) -> torch.Tensor:
        """bool [B, Hq]: the heads that do not see it.

        Raises:
            PlanError: the layer has fewer heads than are named.
        """
        count, device = prompt.query.shape[1], prompt.query.device
        if self.heads[-1] >= count:
            raise PlanError(
                f"visual_heads: head {self.heads[-1]} is out of range; the model has heads 0 to {count - 1}."
            )
        blind = [head not in self.heads for head in range(count)]
        return torch.tensor(blind).to(device) & prompt.has_image[:, None]


@dataclass(frozen=True)
class _Unnormalised(_Stage):
    changes: ClassVar[frozenset[str]] = frozenset({"mix"})
    groups: ClassVar[int] = 2

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        return prompt.tokens.visual.long()

    def change(self, prompt: LayerPrompt) -> Change:
        always = ((0.0, 0.0, -1.0),)
        return Change(mix=Mix.of(self.blind(prompt), ((1.0, 0.0), (0.0, 0.0)), always))


@dataclass(frozen=True)
class _Renormalised(_Stage):
    changes: ClassVar[frozenset[str]] = frozenset({"bias"})

    def change(self, prompt: LayerPrompt) -> Change:
        hidden = self.blind(prompt)[..., None] & prompt.tokens.visual[:, None]
        return Change(bias=torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, float("-inf")))
