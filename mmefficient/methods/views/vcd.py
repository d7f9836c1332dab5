"""VCD (Leng et al., CVPR 2024): what a noisy picture also makes likely is taken off."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.points import about
from mmefficient.view import Sight, View

STEPS = 1000


@dataclass(frozen=True)
class VCD(View):
    """Logits (1 + alpha) l - alpha l', l' from a noisy picture, among tokens at least `beta` as likely as the best."""

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.16922"
    summary: ClassVar[str] = "contrast the picture with a noisy one (two forwards per token)"

    alpha: float = field(default=1.0, metadata=about("weight of the contrast"))
    beta: float = field(default=0.1, metadata=about("least probability of a token, as a share of the likeliest's"))
    step: int = field(default=500, metadata=about("diffusion step, 0 to 999, that says how noisy"))
    seed: int = field(default=0, metadata=about("of the noise", quiet=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.step < STEPS:
            raise PlanError(f"vcd: step={self.step} is outside 0 to {STEPS - 1}.")
        check_share(self.name, self.beta)

    def pictures(self, sight: Sight) -> torch.Tensor:
        """Every picture gets the noise it would get alone: that of the seed, for its shape."""
        pixels = sight.pixels
        rate = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
        left = float((1 - rate).cumprod(0)[self.step])
        generator = torch.Generator().manual_seed(self.seed)
        shape = pixels.shape[1:] if pixels.ndim > 3 else pixels.shape  # patches in a row are parts of one picture
        noise = torch.randn(shape, generator=generator).to(pixels.device)
        return (math.sqrt(left) * pixels.float() + math.sqrt(1 - left) * noise).to(pixels.dtype)

    def combine(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * own - self.alpha * other, own, self.beta)


def plausible(combined: torch.Tensor, own: torch.Tensor, share: float) -> torch.Tensor:
    """`combined` without the tokens that the logits `own` make less likely than `share` times their best, [..., V]."""
    return combined.masked_fill(own < own.amax(-1, keepdim=True) + math.log(share), float("-inf"))


def check_share(name: str, share: float) -> None:
    """Raises PlanError unless `share`, of the largest probability, is one."""
    if not 0 < share <= 1:
        raise PlanError(f"{name}: beta={share} is outside (0, 1]; it is a share of the largest probability.")
