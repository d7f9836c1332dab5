"""A BLIP image-text matching model, which says where in a picture a question looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mmefficient.errors import ModelError
from mmefficient.matchers.base import Looker
from mmefficient.matchers.open_clip import renormalise

LAYER = 6  # of the text encoder, whose cross-attention is explained


class BlipItm(Looker):
    """Gradients of the matching head in one cross-attention layer (GradCAM), as AGLA reads them.

    Args:
        blip: a `transformers.BlipForImageTextRetrieval`; tokenizer: its tokenizer; layer: of the text encoder.
        mean, std: per channel, of its pixels.
    """

    def __init__(
        self, blip: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float], layer: int = LAYER
    ) -> None:
        self.blip, self.tokenizer, self.mean, self.std = blip.eval().requires_grad_(False), tokenizer, mean, std
        self.layer = blip.text_encoder.encoder.layer[layer]

    @classmethod
    def from_pretrained(cls, name: str) -> BlipItm:
        """Raises ModelError: `name` is no BLIP retrieval checkpoint, or cannot be reached."""
        from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

        try:
            pixels = AutoImageProcessor.from_pretrained(name)
            blip = BlipForImageTextRetrieval.from_pretrained(name)
            return cls(blip, AutoTokenizer.from_pretrained(name), pixels.image_mean, pixels.image_std)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"matcher='blip:{name}' cannot be loaded ({str(error).splitlines()[0]}); give a folder or hub id, such "
                "as blip:Salesforce/blip-itm-large-coco."
            ) from error

    def look(
        self, pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], questions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        side = self.blip.config.vision_config.image_size
        weight = next(self.blip.to(pixels.device).parameters())
        given = renormalise(pixels.float(), mean, std, self.mean, self.std)
        given = F.interpolate(given, size=(side, side), mode="bicubic", antialias=True).to(weight.dtype)
        text = self.tokenizer(list(questions), return_tensors="pt", padding=True, truncation=True).to(pixels.device)
        encode = self.blip.text_encoder
        plain = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"], "return_dict": True}
        seen: list[torch.Tensor] = []
        handle = self.layer.crossattention.self.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        try:
            with torch.enable_grad():
                states = self.blip.vision_model(given).last_hidden_state.requires_grad_()
                whole = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
                joint = encode(**plain, encoder_hidden_states=states, encoder_attention_mask=whole).last_hidden_state
                matched = self.blip.itm_head(joint[:, 0])[:, 1]
                (slope,) = torch.autograd.grad(matched.sum(), seen)
        finally:
            handle.remove()
        with torch.no_grad():
            attended = (seen[0] * slope.clamp(min=0)).mean(1)[..., 1:].float()  # [N, Q, T], without CLS
            counts = text["attention_mask"].sum(1)  # the words lie between two special tokens
            place = torch.arange(attended.shape[1], device=attended.device)
            words = (place >= 1) & (place < counts[:, None] - 1)
            maps = (attended * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)
            one = self.blip.vision_proj(states[:, 0])
            two = self.blip.text_proj(encode(**plain).last_hidden_state[:, 0])
            return maps.detach(), F.cosine_similarity(one.float(), two.float(), dim=-1)
