"""Processors for the models of `tests.tiny`, and checkpoints as a user would have them. Nothing is downloaded."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.tiny import END, IMAGE, LAYERS, PAD, START, VIDEO, build

__all__ = ["LAYERS", "VISUAL_TOKENS", "processor", "save"]

VISUAL_TOKENS = 16
"""Of one image in the ``llava`` checkpoint."""

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = "user assistant what is in the picture are there how many a an and dog dogs cat cats bus it left right yes no"


def processor(family: str = "llava") -> Any:
    """The processor of a family, cut to the sizes and token ids of `tests.tiny.build`."""
    tokenizer = _tokenizer()
    template = TEMPLATE.replace("IMAGE", "<start><image><end>" if family == "qwen2_5_vl" else "<image>")
    square = {"height": 16, "width": 16}
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    llava = {"tokenizer": tokenizer, "patch_size": 4, "image_token": "<image>", "chat_template": template}
    clip = {"size": {"shortest_edge": 16}, "crop_size": square}
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessor(**clip),
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **llava,
        )
    if family == "llava_next":
        return LlavaNextProcessor(
            LlavaNextImageProcessor(**clip, image_grid_pinpoints=pinpoints),
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **llava,
        )
    if family == "llava_onevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints),
            tokenizer,
            LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=VISUAL_TOKENS,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            image_token="<image>",
            video_token="<video>",
            chat_template=template,
        )
    patches = {"patch_size": 4, "temporal_patch_size": 1, "merge_size": 2}
    edges = {"shortest_edge": 64, "longest_edge": 1024}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=edges, **patches),
        tokenizer,
        Qwen2VLVideoProcessor(size=edges, **patches),
        chat_template=template,
    )


def save(folder: Path, family: str = "llava") -> Path:
    """Write model and processor to `folder` and return it. The same weights on every call."""
    build(family).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    special = {"<pad>": PAD, "<s>": 1, "<image>": IMAGE, "<video>": VIDEO, "<start>": START, "<end>": END}
    plain = ["<unk>", "</s>", *WORDS.split(), *string.punctuation]
    free = [number for number in range(100) if number not in special.values()]
    plain += [f"w{number}" for number in range(len(free) - len(plain))]
    tokenizer = Tokenizer(models.WordLevel(special | dict(zip(plain, free, strict=True)), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "vision_start_token": "<start>",
            "vision_end_token": "<end>",
        },
    )
