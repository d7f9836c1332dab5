"""AGLA (An et al., CVPR 2025): a second picture, black where the question does not look, adds its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from mmefficient.errors import ModelError, PlanError
from mmefficient.matchers import BLIP, WORDS
from mmefficient.methods.views.vcd import check_share, plausible
from mmefficient.points import about
from mmefficient.view import Sight, View

UNKNOWN = 0.6  # share that stays where no one says how well the question fits
BLUR = 0.02  # standard deviation, as a share of the picture's side


@dataclass(frozen=True)
class AGLA(View):
    """Logits l + alpha l', l' from the masked picture, among tokens at least `beta` as likely as the best by l."""

    name: ClassVar[str] = "agla"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.12718"
    summary: ClassVar[str] = "add the logits of a picture blackened off the question's subject (two forwards per token)"
    alpha: float = field(default=2.0, metadata=about("weight of the masked picture"))
    beta: float = field(default=0.5, metadata=about("least probability of a token, as a share of the likeliest's"))
    keep: float | Literal["auto"] = field(
        default="auto",
        metadata=about("share of the pixels that stay; auto = by how well BLIP says the question fits, else 0.6"),
    )
    matcher: str = field(default=WORDS, metadata=about("what compares patches with the question: see docs/matchers.md"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, self.beta)
        if self.keep != "auto" and not 0 < self.keep <= 1:
            raise PlanError(f"agla: keep={self.keep!r} is neither 'auto' nor a share of the pixels in (0, 1].")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """A looker compares whole pictures with questions, a matcher patches."""
        return frozenset({"look" if self.matcher.startswith(BLIP) else "match"})

    def pictures(self, sight: Sight) -> torch.Tensor:
        pixels = sight.pixels
        if pixels.ndim != 4:
            raise ModelError("agla needs pictures that are one square crop each; this family cuts them otherwise.")
        if sight.look is not None:
            map_, cosine = sight.look
            share = (1 - cosine / 2).clamp(max=1 - 1e-5)
        else:
            assert sight.match is not None
            map_ = sight.match.relevance()
            share = torch.full((len(map_),), UNKNOWN, device=map_.device)
        if len(map_) != len(pixels) or math.isqrt(map_.shape[1]) ** 2 != map_.shape[1]:
            raise ModelError("agla needs pictures whose patches form a square; this family cuts them otherwise.")
        if self.keep != "auto":
            share = torch.full_like(share, self.keep)
        stays = mask(map_, (pixels.shape[2], pixels.shape[3]), share)
        return torch.where(stays[:, None], pixels, pixels.new_tensor(sight.black)[:, None, None])

    def combine(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return plausible(own + self.alpha * other, own, self.beta)


def mask(relevance: torch.Tensor, size: tuple[int, int], keep: torch.Tensor) -> torch.Tensor:
    """bool [N, *size]: the share `keep` [N] of the pixels where the patches' relevance [N, T], smooth, is highest."""
    side = math.isqrt(relevance.shape[1])
    maps = F.interpolate(_unit(relevance.unflatten(1, (side, side)))[:, None], size, mode="bicubic")
    sigma = BLUR * max(size)
    reach = math.ceil(3 * sigma)
    place = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = (-place.square() / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    maps = F.pad(maps, [reach] * 4, mode="replicate")
    maps = F.conv2d(F.conv2d(maps, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]
    rank = (keep.double() * maps[0].numel()).round().long().clamp(min=1) - 1
    least = maps.flatten(1).sort(descending=True).values.gather(1, rank[:, None])
    return maps >= least[..., None]


def _unit(maps: torch.Tensor) -> torch.Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
