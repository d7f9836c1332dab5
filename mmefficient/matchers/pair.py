"""The text side of the CLIP model whose vision tower the model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mmefficient.errors import ModelError
from mmefficient.matchers.base import Matcher, Seen, pieces

RELATED = 0.9
"""Least cosine of two towers' patch filters; a tower that was trained on stays far above, another model does not."""


class ClipPair(Matcher):
    """Patch states of the model's own tower, through CLIP's last norm and projection; texts through its text tower.

    Args:
        clip: a `transformers.CLIPModel`; tokenizer: its tokenizer.
    """

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.clip, self.tokenizer = clip.eval(), tokenizer

    @classmethod
    def from_pretrained(cls, name: str) -> ClipPair:
        """Raises ModelError: `name` is no CLIP checkpoint, or cannot be reached."""
        from transformers import AutoTokenizer, CLIPModel

        try:
            return cls(CLIPModel.from_pretrained(name), AutoTokenizer.from_pretrained(name))
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"matcher={name!r} is no CLIP checkpoint that can be loaded ({str(error).splitlines()[0]}); give a "
                "folder or hub id of one, 'open_clip:ARCHITECTURE/PRETRAINED', or 'embeddings'."
            ) from error

    def patches(self, seen: Seen) -> torch.Tensor:
        own = self.clip.vision_model
        if not _related(own, seen.tower):
            raise ModelError(
                f"the model's {type(seen.tower).__name__} is not the vision tower of the CLIP model given as matcher; "
                "give the CLIP model it was taken from, or an 'open_clip:' one that looks at the pictures itself."
            )
        self.clip.to(seen.features.device)
        weight = self.clip.visual_projection.weight
        with torch.no_grad():
            return self.clip.visual_projection(own.post_layernorm(seen.features.to(weight))).float()

    def texts(self, questions: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        words = [self.tokenizer(question, add_special_tokens=False)["input_ids"] for question in questions]
        length = self.clip.config.text_config.max_position_embeddings
        ids, used = pieces(words, length, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.clip.to(device)
        with torch.no_grad():
            found = self.clip.get_text_features(ids.flatten(0, 1).to(device), return_dict=True).pooler_output
        return found.float().unflatten(0, ids.shape[:2]), used.to(device)


def _related(one: Any, other: Any) -> bool:
    """Whether two towers have (nearly) the same patch filters."""
    try:
        filters = [tower.embeddings.patch_embedding.weight.float().cpu().flatten() for tower in (one, other)]
    except AttributeError:
        return False
    return len(filters[0]) == len(filters[1]) and bool(F.cosine_similarity(filters[0], filters[1], dim=0) >= RELATED)
