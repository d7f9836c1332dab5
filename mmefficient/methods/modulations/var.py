"""VAR (Kang et al., ICLR 2025): attention spent on sinks goes to the visual tokens that are none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.modulation import Change, LayerPrompt, Mix, Modulation, Rows
from mmefficient.points import about
from mmefficient.tokens import Role

OTHER, VISUAL, VISUAL_SINK, TEXT_SINK = range(4)


@dataclass(frozen=True)
class VAR(Modulation):
    """Heads that look at the image keep the share `p` of their attention on sinks and spend the rest on the image."""

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03321"
    summary: ClassVar[str] = "move attention from sinks to visual tokens, in heads that look at the image"
    changes: ClassVar[frozenset[str]] = frozenset({"mix"})
    rows: ClassVar[Rows] = "answer"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    groups: ClassVar[int] = 4
    per_layer: ClassVar[bool] = True

    p: float = field(default=0.6, metadata=about("share of their attention that sinks keep"))
    rho: float = field(default=0.5, metadata=about("least share of a head's visual attention that is on no sink"))
    tau: float = field(default=20.0, metadata=about("activation, over the token's root mean square, that makes a sink"))
    mass: float = field(
        default=0.2, metadata=about("least attention on the image of a head that is changed", quiet=True)
    )
    dims: tuple[int, ...] = field(
        default=(), metadata=about("sink dimensions; none = the two in which the first token is largest", quiet=True)
    )
    first: int = field(default=2, metadata=about("first decoder layer that is changed"))
    last: int = field(
        default=-1, metadata=about("last decoder layer that is changed; -1 = the model's last", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p <= 1:
            raise PlanError(f"var: p={self.p} is outside [0, 1]; it is the share that sinks keep.")

    def sinks(self, prompt: LayerPrompt) -> torch.Tensor:
        """bool [B, n]: tokens whose normalised activation in a sink dimension exceeds tau."""
        assert prompt.hidden is not None
        x = prompt.hidden.float()
        size = (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).abs()
        real = prompt.tokens.role != Role.PAD
        if self.dims:
            if not all(0 <= each < x.shape[-1] for each in self.dims):
                raise PlanError(f"var: dims={self.dims} are not all below {x.shape[-1]}, the width of the model.")
            largest = size[..., torch.tensor(self.dims, device=x.device)].amax(-1)
        else:
            start = real.long().argmax(1)
            dims = size[torch.arange(len(x), device=x.device), start].topk(2).indices  # [B, 2]
            largest = size.gather(2, dims[:, None].expand(-1, x.shape[1], -1)).amax(-1)
        return (largest > self.tau) & real

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        visual, sink = prompt.tokens.visual, self.sinks(prompt)
        return torch.where(visual, torch.where(sink, VISUAL_SINK, VISUAL), torch.where(sink, TEXT_SINK, OTHER))

    def change(self, prompt: LayerPrompt) -> Change:
        some = (self.sinks(prompt) & prompt.tokens.visual).any(1, keepdim=True)
        keep, free = self.p, 1 - self.p
        # of OTHER, VISUAL, VISUAL_SINK and TEXT_SINK; rows are what they become
        move = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, free, free), (0.0, 0.0, keep, 0.0), (0.0, 0.0, 0.0, keep))
        looks = ((0.0, 1 - self.rho, -self.rho, 0.0, 0.0), (0.0, 1.0, 1.0, 0.0, self.mass))
        return Change(mix=Mix.of(some, move, looks))
