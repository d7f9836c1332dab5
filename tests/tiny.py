"""Tiny random models of the four families, and prompts for them. Nothing is downloaded."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from mmefficient.profiles import Profile

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")
LAYERS = 4
IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 4}  # fmt: skip
SIZES = [(24, 30), (16, 16), (40, 20)]
"""Heights and widths of successive images; families with variable resolution make different token counts of them."""


def _profile(kind: str, facts: dict[str, Any], **shapes: tuple[int, ...]) -> Path:
    """A profile with random parameters of the given shapes, in a folder that ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="mmefficient-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    noise = torch.Generator().manual_seed(0)
    path = folder / f"{kind}-tiny.json"
    tensors = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    Profile(kind, "any", facts, {}).write(path, tensors)
    return path


GATES = _profile(
    "dyvte", {"layers": LAYERS, "bias": 0.0}, inner=(LAYERS - 1, 8, 2 * TEXT["hidden_size"]), outer=(LAYERS - 1, 2, 8)
)
HEAD = _profile("urag", {"layer": 1}, inner=(16, 32), inner_bias=(16,), outer=(8, 16), outer_bias=(8,))


def build(family: str, implementation: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode, float32, on the CPU."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"image_token_id": IMAGE, "tie_word_embeddings": False}
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    model: PreTrainedModel
    if family == "llava":
        tower = CLIPVisionConfig(**TOWER)
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=tower, text_config=LlamaConfig(**TEXT), **common)
        )
    elif family == "llava_next":
        tower = CLIPVisionConfig(**TOWER)
        common["image_grid_pinpoints"] = pinpoints
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=tower, text_config=LlamaConfig(**TEXT), **common)
        )
    elif family == "llava_onevision":
        siglip = SiglipVisionConfig(**TOWER, vision_use_head=False)
        common.update(image_grid_pinpoints=pinpoints, video_token_id=VIDEO, vision_feature_layer=-1)
        config = LlavaOnevisionConfig(vision_config=siglip, text_config=Qwen2Config(**TEXT), **common)
        model = LlavaOnevisionForConditionalGeneration(config)
    else:
        vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
                  "spatial_merge_size": 2, "temporal_patch_size": 1, "window_size": 16, "out_hidden_size": 32,
                  "fullatt_block_indexes": [1]}  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        ids = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
        text = {**TEXT, "rope_parameters": rope}
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(vision_config=vision, text_config=text, **common, **ids)
        )
    model = model.eval()
    for parameter in model.parameters():  # larger weights: outputs that depend visibly on what is seen
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.set_attn_implementation({"text_config": implementation})
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def visual_ids(family: str, size: tuple[int, int]) -> tuple[list[int], dict[str, Any]]:
    """Placeholder ids of one image, and its pixel inputs."""
    height, width = size
    noise = torch.Generator().manual_seed(height * 100 + width)
    if family == "llava":
        return [IMAGE] * 16, {"pixel_values": torch.randn(1, 3, 16, 16, generator=noise)}
    if family == "qwen2_5_vl":
        rows, cols = (2 * -(-side // 8) for side in size)
        pixels = torch.randn(rows * cols, 3 * 4 * 4, generator=noise)
        ids = [START, *[IMAGE] * (rows * cols // 4), END]
        return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, cols]])}
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    crops = image_size_to_num_patches([height, width], [[16, 32], [32, 16], [32, 32]], 16)
    model = build(family)
    pixels = torch.randn(1, crops, 3, 16, 16, generator=noise)
    sizes = torch.tensor([[height, width]])
    count = len(model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output[0])
    return [IMAGE] * count, {"pixel_values": pixels, "image_sizes": sizes}


def prompt(family: str, images: int, before: int, after: int, first: int = 0) -> tuple[list[int], list[dict[str, Any]]]:
    """Ids of a prompt of `before` text tokens, `images` images (text between them) and `after` text tokens."""
    generator = torch.Generator().manual_seed(images * 31 + before * 7 + after)
    words = torch.randint(2, 80, (before + after + images,), generator=generator).tolist()
    ids, pixels = words[:before], []
    for number in range(images):
        visual, inputs = visual_ids(family, SIZES[(first + number) % len(SIZES)])
        ids += [*visual, words[before + after + number]]
        pixels.append(inputs)
    return ids + words[before : before + after], pixels


def collate(family: str, prompts: Sequence[tuple[list[int], list[dict[str, Any]]]]) -> dict[str, Any]:
    """A left-padded batch; an attention mask always, as processors give one."""
    longest = max(len(ids) for ids, _ in prompts)
    ids = torch.tensor([[PAD] * (longest - len(ids)) + ids for ids, _ in prompts])
    lengths = torch.tensor([len(ids) for ids, _ in prompts])[:, None]
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths).long()}
    pixels = [inputs for _, images in prompts for inputs in images]
    if family == "qwen2_5_vl":
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    if not pixels:
        return batch
    for name in pixels[0]:
        parts = [inputs[name] for inputs in pixels]
        if name == "pixel_values" and parts[0].ndim == 5:  # crops are padded to the most any image has
            most = max(part.shape[1] for part in parts)
            parts = [torch.cat([part, part.new_zeros(1, most - part.shape[1], *part.shape[2:])], 1) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def ragged_prompts(family: str) -> list[tuple[list[int], list[dict[str, Any]]]]:
    """Rows of different lengths: one image, none, and two of other sizes."""
    return [prompt(family, 1, 3, 6), prompt(family, 0, 2, 5), prompt(family, 2, 4, 3, first=1)]


def ragged_batch(family: str) -> dict[str, Any]:
    """The rows of `ragged_prompts` in one left-padded batch."""
    return collate(family, ragged_prompts(family))
