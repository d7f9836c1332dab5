"""Where the adapters say a token comes from, against what the models computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.errors import ModelError
from mmefficient.models import adapter_for
from mmefficient.models.base import square_layout
from mmefficient.tokens import Layout
from tests import tiny

SIZES = [(24, 30), (16, 16), (40, 20), (60, 20), (15, 31)]


def encode(family: str, sizes: list[tuple[int, int]]) -> tuple[Any, list[Layout], list[torch.Tensor], dict[str, Any]]:
    model = tiny.build(family)
    images = [tiny.visual_ids(family, size)[1] for size in sizes]
    inputs = tiny.collate(family, [([1], images)])
    arguments = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
    with torch.no_grad():
        features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
    return model, adapter_for(model).layouts("image", arguments, features), features, arguments


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_sources_are_the_patches_that_were_projected(family: str) -> None:
    seen: list[torch.Tensor] = []
    model, layouts, features, arguments = encode(family, SIZES)
    handle = model.model.multi_modal_projector.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model.model.get_image_features(**arguments, return_dict=True)
    handle.remove()
    projected, start = seen[0], 0
    crops = adapter_for(model).crops(arguments, len(layouts))
    for layout, tokens, count in zip(layouts, features, crops, strict=True):
        mine = projected[start : start + count].flatten(0, 1)
        start += count
        image = layout.separator == 0
        assert torch.equal(tokens[image], mine[layout.source[image]])
        assert (layout.source[~image] == -1).all()
        if family != "llava":
            assert torch.equal(tokens[~image], model.model.image_newline.expand(int((~image).sum()), -1))
    assert start == len(projected)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_rows_and_columns_of_assembled_crops(family: str) -> None:
    _, layouts, _, arguments = encode(family, SIZES)
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    for layout, size in zip(layouts, arguments["image_sizes"], strict=True):
        overview = (layout.view == 0) & (layout.separator == 0)
        assert torch.equal(layout.row[overview] * 4 + layout.col[overview], torch.arange(16))
        hires = (layout.view == 1) & (layout.separator == 0)
        if not hires.any():
            assert layout.line.eq(0).all()
            continue
        _, crops_wide = get_anyres_image_grid_shape(size, [[16, 32], [32, 16], [32, 32]], 16)
        crop, patch = layout.source[hires] // 16 - 1, layout.source[hires] % 16
        down = crop // crops_wide * 4 + patch // 4
        along = crop % crops_wide * 4 + patch % 4
        assert torch.equal(layout.tile[hires], crop + 1)
        assert torch.equal(layout.row[hires], down - down.min())
        assert torch.equal(layout.col[hires], along - along.min())
        assert torch.equal(layout.line[hires], layout.row[hires])
        assert layout.line[overview].eq(-1).all()
        ends = layout.separator == 1
        assert layout.line[ends].tolist() == list(range(int(layout.row[hires].max()) + 1))


def test_uncut_images_of_several() -> None:
    model = tiny.build("llava_onevision")
    sizes = torch.tensor([[24, 30], [24, 30], [40, 20]])
    crops = adapter_for(model).crops({"image_sizes": sizes, "batch_num_images": torch.tensor([1, 2])}, 3)
    assert crops == [5, 1, 1]


def test_resampled_crops_have_no_source() -> None:
    model = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_1"
    inputs = tiny.visual_ids("llava_onevision", (32, 32))[1]
    with torch.no_grad():
        features = model.model.get_image_features(**inputs, vision_aspect_ratio="anyres_max_1", return_dict=True)
    layout = adapter_for(model).layouts("image", inputs, features.pooler_output)[0]
    assert len(layout) == len(features.pooler_output[0]) < 16 + 8 * 9
    hires = layout.view == 1
    assert layout.source[hires].eq(-1).all()
    assert layout.source[~hires].tolist() == list(range(16))
    width = int(layout.col[hires].max())
    assert int(layout.separator.sum()) * (width + 1) == int(hires.sum())


def test_videos() -> None:
    onevision = adapter_for(tiny.build("llava_onevision")).layouts("video", {}, [torch.zeros(13, 32)])[0]
    assert onevision.tile.tolist() == [0] * 4 + [1] * 4 + [2] * 5
    assert onevision.separator.tolist() == [0] * 12 + [1]
    grid = torch.tensor([[2, 4, 6]])
    qwen = adapter_for(tiny.build("qwen2_5_vl")).layouts("video", {"video_grid_thw": grid}, [torch.zeros(12, 32)])[0]
    assert (len(qwen), int(qwen.row.max()), int(qwen.col.max()), int(qwen.tile.max())) == (12, 1, 2, 1)


def test_square_layouts() -> None:
    assert len(square_layout(16)) == 16
    with_class = square_layout(17)
    assert with_class.row.tolist()[:3] == [-1, 0, 0]
    assert with_class.source.tolist() == list(range(17))
    with pytest.raises(ModelError, match="no square"):
        square_layout(15)


def test_tower_layer_is_the_one_whose_output_is_projected() -> None:
    model = tiny.build("llava")
    layers = model.model.vision_tower.encoder.layers
    for choice, index in ((-2, 1), (-1, 2), (1, 0), (3, 2)):
        model.config.vision_feature_layer = choice
        assert adapter_for(model).tower_parts()[1] is layers[index].self_attn
    for choice in (0, -4, [1, 2]):
        model.config.vision_feature_layer = choice
        with pytest.raises(ModelError):
            adapter_for(model).tower_parts()
