"""Qwen2.5-VL: native resolution, 2-by-2 merged patches, (time, height, width) positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from mmefficient.models.base import Adapter
from mmefficient.tokens import Layout


class Qwen25VLAdapter(Adapter):
    """`Qwen2_5_VLForConditionalGeneration`."""

    mrope: ClassVar[bool] = True

    def layouts(self, kind: str, arguments: Mapping[str, Any], features: Sequence[torch.Tensor]) -> list[Layout]:
        merge = self.config.vision_config.spatial_merge_size
        grids = torch.as_tensor(arguments[f"{kind}_grid_thw"]).tolist()
        layouts = [Layout.grid(rows // merge, cols // merge, frames) for frames, rows, cols in grids]
        # a token is merged from several patches, so none of them is its source
        return [replace(layout, source=torch.full_like(layout.source, -1)) for layout in layouts]
