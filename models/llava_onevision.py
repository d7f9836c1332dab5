"""LLaVA-OneVision: LLaVA-NeXT's packing with a cap on the assembled grid, and pooled video frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmefficient.models.llava_next import LlavaNextAdapter
from mmefficient.tokens import Layout


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`."""

    def crops(self, arguments: Mapping[str, Any], images: int) -> list[int]:
        counts = super().crops(arguments, images)
        per_row = arguments.get("batch_num_images")
        if per_row is None:
            return counts
        several = [int(number) > 1 for number in per_row for _ in range(int(number))]  # such images are not cut up
        return [1 if whole else count for whole, count in zip(several, counts, strict=True)]

    def pack(self, numbers: list[torch.Tensor], sizes: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        packed, _ = self.base.pack_image_features(
            numbers, sizes, image_newline=newline, vision_aspect_ratio=self.config.vision_aspect_ratio
        )
        return packed[0]

    def layouts(self, kind: str, arguments: Mapping[str, Any], features: Sequence[torch.Tensor]) -> list[Layout]:
        if kind == "image":
            return super().layouts(kind, arguments, features)
        side = math.ceil(self.config.vision_config.image_size // self.config.vision_config.patch_size / 2)
        layouts = []
        for tokens in features:
            frames = Layout.grid(side, side, (len(tokens) - 1) // side**2)
            columns = {name: torch.cat([value, value[-1:]]) for name, value in vars(frames).items()}
            columns["separator"][-1] = 1
            columns["line"].fill_(0)  # the one line break stays as long as any token of the video does
            columns["source"].fill_(-1)
            layouts.append(Layout(**columns))
        return layouts
