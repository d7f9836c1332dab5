"""AGLA (An et al., CVPR 2025): a second picture, black where the question does not look, adds its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.errors import ModelError, PlanError
from mmefficient.matchers import EMBEDDINGS
from mmefficient.methods.views.vcd import check_share, plausible
from mmefficient.points import MatchTokens, about
from mmefficient.view import Sight, View

BLUR = 0.02  # standard deviation, as a share of the picture's side


@dataclass(frozen=True)
class AGLA(View):
    """Logits l + alpha l', l' from the masked picture, among tokens at least `beta` as likely as the best by l."""

    name: ClassVar[str] = "agla"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.12718"
    summary: ClassVar[str] = "add the logits of a picture blackened off the question's subject (two forwards per token)"
    needs: ClassVar[frozenset[str]] = frozenset({"match"})

    alpha: float = field(default=2.0, metadata=about("weight of the masked picture"))
    beta: float = field(default=0.5, metadata=about("least probability of a token, as a share of the likeliest's"))
    keep: float = field(default=0.6, metadata=about("share of the pixels that stay"))
    matcher: str = field(
        default=EMBEDDINGS, metadata=about("what compares patches with the question: see docs/matchers.md")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, self.beta)
        if not 0 < self.keep <= 1:
            raise PlanError(f"agla: keep={self.keep} is outside (0, 1]; it is a share of the pixels.")

    def pictures(self, sight: Sight) -> torch.Tensor:
        assert sight.match is not None
        pixels, patches = sight.pixels, sight.match.patches.shape[1]
        if pixels.ndim != 4 or len(pixels) != len(sight.match.patches) or math.isqrt(patches) ** 2 != patches:
            raise ModelError("agla needs pictures that are one square crop each; this family cuts them otherwise.")
        stays = mask(relevance(sight.match), (pixels.shape[2], pixels.shape[3]), self.keep)
        return torch.where(stays[:, None], pixels, pixels.new_tensor(sight.black)[:, None, None])

    def combine(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return plausible(own + self.alpha * other, own, self.beta)


def relevance(match: MatchTokens) -> torch.Tensor:
    """How well every patch goes with the question, float32 [N, T]: mean cosine over the question's pieces."""
    patches, texts = F.normalize(match.patches, dim=-1), F.normalize(match.texts, dim=-1)
    cosine = (patches @ texts.transpose(1, 2)).masked_fill(~match.valid[:, None], 0.0)
    mean = cosine.sum(2) / match.valid.sum(1, keepdim=True).clamp(min=1)
    return -mean if match.inverted else mean


def mask(relevance: torch.Tensor, size: tuple[int, int], keep: float) -> torch.Tensor:
    """bool [N, *size]: the share `keep` of the pixels where the patches' relevance [N, T], made smooth, is highest."""
    side = math.isqrt(relevance.shape[1])
    maps = F.interpolate(_unit(relevance.unflatten(1, (side, side)))[:, None], size, mode="bicubic")
    sigma = BLUR * max(size)
    reach = math.ceil(3 * sigma)
    place = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = (-place.square() / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    maps = F.pad(maps, [reach] * 4, mode="replicate")
    maps = F.conv2d(F.conv2d(maps, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]
    least = maps.flatten(1).sort(descending=True).values[:, max(1, round(keep * maps[0].numel())) - 1]
    return maps >= least[:, None, None]


def _unit(maps: torch.Tensor) -> torch.Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
