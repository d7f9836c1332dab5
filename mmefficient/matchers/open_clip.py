"""An open_clip model that looks at the pictures itself, so that any vision tower can be matched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mmefficient.errors import ModelError
from mmefficient.matchers.base import Matcher, Seen, pieces


class OpenClip(Matcher):
    """Patch states of the layer before the last, through open_clip's last norm and projection, on the model's own grid.

    Args:
        clip: an `open_clip.CLIP` with a vision transformer; tokenizer: its tokenizer.

    Raises:
        ModelError: it is another kind of model.
    """

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        visual = getattr(clip, "visual", None)
        if getattr(visual, "proj", None) is None or not hasattr(visual, "forward_intermediates"):
            raise ModelError(f"the matcher needs a vision transformer with a projection, not {type(visual).__name__}.")
        self.clip, self.tokenizer = clip.eval(), tokenizer

    @classmethod
    def from_name(cls, name: str) -> OpenClip:
        """`name` is "ARCHITECTURE" (random weights), or "ARCHITECTURE/PRETRAINED", a tag or a file.

        Raises:
            ModelError: open_clip is not installed, or has no such model.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ModelError("matcher='open_clip:...' needs open_clip: pip install 'mmefficient[clip]'.") from error
        architecture, _, pretrained = name.partition("/")
        try:
            clip = open_clip.create_model(architecture, pretrained=pretrained or None)
            return cls(clip, open_clip.get_tokenizer(architecture))
        except (RuntimeError, OSError, ValueError) as error:
            raise ModelError(f"open_clip cannot load {name!r}: {str(error).splitlines()[0]}") from error

    def patches(self, seen: Seen) -> torch.Tensor:
        visual = self.clip.to(seen.pixels.device).visual
        weight = visual.conv1.weight
        settings = getattr(visual, "preprocess_cfg", {})
        pixels = renormalise(seen.pixels.float(), seen.mean, seen.std, settings.get("mean"), settings.get("std"))
        pixels = F.interpolate(pixels, size=_pair(visual.image_size), mode="bicubic", antialias=True)
        with torch.no_grad():
            states = visual.forward_intermediates(
                pixels.to(weight.dtype),
                indices=[len(visual.transformer.resblocks) - 2],
                normalize_intermediates=True,
                intermediates_only=True,
            )["image_intermediates"][0]
            side = math.isqrt(seen.features.shape[1])
            states = F.interpolate(states.float(), size=(side, side), mode="bilinear")
            return states.flatten(2).transpose(1, 2) @ visual.proj.float()

    def texts(self, questions: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        length, tokenizer = self.clip.context_length, self.tokenizer
        if hasattr(tokenizer, "sot_token_id"):
            words = [tokenizer.encode(question) for question in questions]
            ids, used = pieces(words, length, tokenizer.sot_token_id, tokenizer.eot_token_id)
        else:  # a tokenizer that frames and cuts by itself
            ids = tokenizer(list(questions), context_length=length)[:, None]
            used = torch.ones(ids.shape[:2], dtype=torch.bool)
        with torch.no_grad():
            found = self.clip.to(device).encode_text(ids.flatten(0, 1).to(device))
        return found.float().unflatten(0, ids.shape[:2]), used.to(device)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def renormalise(
    pixels: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    to_mean: Sequence[float] | None,
    to_std: Sequence[float] | None,
) -> torch.Tensor:
    """Pixels [n, 3, H, W] normalised one way, as another model wants them; None = the same way."""
    if to_mean is None or to_std is None:
        return pixels
    old_mean, old_std, new_mean, new_std = (pixels.new_tensor(x)[:, None, None] for x in (mean, std, to_mean, to_std))
    return (pixels * old_std + old_mean - new_mean) / new_std
