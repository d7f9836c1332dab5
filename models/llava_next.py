"""LLaVA-NeXT: an overview crop, then the crops assembled into one grid with a learned line break after each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.llava_next import modeling_llava_next as stock

from mmefficient.models.base import ProjectorAdapter, square_layout
from mmefficient.tokens import Layout


class LlavaNextAdapter(ProjectorAdapter):
    """`LlavaNextForConditionalGeneration`."""

    def crops(self, arguments: Mapping[str, Any], images: int) -> list[int]:
        crop = self.config.vision_config.image_size
        pinpoints = self.config.image_grid_pinpoints
        sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
        return [stock.image_size_to_num_patches(size, pinpoints, crop) for size in sizes]

    def layouts(self, kind: str, arguments: Mapping[str, Any], features: Sequence[torch.Tensor]) -> list[Layout]:
        sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
        crops = self.crops(arguments, len(features))
        return [self.layout(size, count) for size, count in zip(sizes, crops, strict=True)]

    def layout(self, size: Sequence[int], crops: int) -> Layout:
        """The layout of one image, found by letting the model pack patch numbers in place of features.

        Args:
            size: (height, width) of the image; crops: its tower inputs.
        """
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        each = side * side + (0 if self.config.vision_feature_select_strategy == "default" else self.class_tokens)
        numbers = torch.arange(crops * each, dtype=torch.float32).view(crops, each, 1)
        packed = self.pack([numbers], torch.tensor([size]), torch.tensor([-1.0]))[:, 0]
        return self.from_numbers(packed, crops, each)

    @property
    def class_tokens(self) -> int:
        """Tokens the tower puts before the patches."""
        return int(hasattr(getattr(self.base.vision_tower, "embeddings", None), "class_embedding"))

    def pack(self, numbers: list[torch.Tensor], sizes: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        """The model's own packing of one image."""
        strategy = self.config.vision_feature_select_strategy
        packed, _ = self.base.pack_image_features(
            numbers, sizes, vision_feature_select_strategy=strategy, image_newline=newline
        )
        return packed[0]

    @staticmethod
    def from_numbers(packed: torch.Tensor, crops: int, each: int) -> Layout:
        """Read a layout off packed patch numbers [T]; line breaks are -1, resampled patches are fractions."""
        separator = packed == -1
        overview = torch.arange(len(packed)) < each
        if crops == 1:
            base = square_layout(each)
            columns = {name: torch.cat([value, value.new_full((1,), -1)]) for name, value in vars(base).items()}
            ends = {"tile": 0, "view": 0, "separator": 1, "line": 0, "row": -1, "col": -1, "source": -1}
            for name, value in ends.items():
                columns[name][-1] = value
            columns["line"].fill_(0)  # the one line break stays as long as any token of the image does
            return Layout(**columns)
        line = (separator.long().cumsum(0) - separator.long()).masked_fill(overview, -1)
        width = int(separator.nonzero()[0, 0]) - each + 1  # tokens of a row and its line break
        col = (torch.arange(len(packed)) - each) % width
        number = packed.round().long()
        tile = torch.where(separator, -1, number // each)
        source = torch.where(separator, -1, number)
        if not torch.equal(packed, packed.round()):  # a resampled grid has lost its crops
            tile, source = torch.where(overview, 0, 1), torch.where(overview, number, -1)
        base = square_layout(each)
        pad = torch.zeros(len(packed) - each, dtype=torch.long)
        return Layout(
            tile=tile,
            row=torch.where(overview, torch.cat([base.row, pad]), line),
            col=torch.where(overview, torch.cat([base.col, pad]), col),
            view=(~overview).long(),
            separator=separator.long(),
            line=line,
            source=source,
        )
