"""Turns of a conversation in transformers' chat format, and the pictures in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmefficient.errors import InputError
from mmefficient.images import ImageSource, load_image, to_device

Images = ImageSource | Sequence[ImageSource] | None
Message = dict[str, Any]


def user_message(images: Sequence[Any], question: str) -> Message:
    """One user turn in transformers' chat format: the images, then the question.

    Raises:
        InputError: the question is not text.
    """
    if not isinstance(question, str):
        raise InputError(f"A question is text, not a {type(question).__name__}; several go to ask_batch.")
    parts: list[Message] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def as_list(image: Images) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def with_images_read(message: Message) -> Message:
    return _with_images(message, load_image)


def on_device(message: Message, device: torch.device) -> Message:
    return _with_images(message, lambda image: to_device(image, device))


def _with_images(message: Message, change: Callable[[Any], Any]) -> Message:
    parts = [{**p, "image": change(p["image"])} if p["type"] == "image" else p for p in message["content"]]
    return {**message, "content": parts}


def images_of(conversation: list[Message]) -> list[Any]:
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]
