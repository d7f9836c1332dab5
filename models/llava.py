"""LLaVA 1.5: one square grid per image (or a rectangle, with a Pixtral tower)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmefficient.models.base import ProjectorAdapter, square_layout
from mmefficient.tokens import Layout


class LlavaAdapter(ProjectorAdapter):
    """`LlavaForConditionalGeneration`."""

    def layouts(self, kind: str, arguments: Mapping[str, Any], features: Sequence[torch.Tensor]) -> list[Layout]:
        sizes = arguments.get("image_sizes")
        if sizes is None:
            return [square_layout(len(tokens)) for tokens in features]
        patch = self.base.vision_tower.patch_size
        return [
            Layout.grid(int(height) // patch, int(width) // patch) for height, width in torch.as_tensor(sizes).tolist()
        ]
