"""Time from a picture to model inputs on the device: the checkpoint's own processor, and the way `VLM` calls it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mmefficient.bench.floors import wall_ms
from mmefficient.bench.measure import WARM_UP, spread
from mmefficient.images import load_image, to_device
from mmefficient.loading import pixel_options
from mmefficient.messages import user_message
from mmefficient.plan import Plan
from mmefficient.vlm import VLM

SIZES = ((336, 336), (1280, 960), (4000, 3000))
QUESTION = "What is in the picture?"


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random picture with the smooth areas of a photo."""
    width, height = size
    small = torch.randint(0, 256, (24, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def measure(model: Any, processor: Any, sizes: Sequence[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """Per picture size: milliseconds to decode its JPEG, and from the decoded picture and a question to inputs on the
    device, by the stock processor and by `VLM`; and the largest difference of the pixel values, before rounding to the
    model's dtype."""
    vlm = VLM(model, processor)
    found = []
    for size in sizes:
        picture = photo(size)
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=90)
        ways = {
            "jpeg": lambda file=file: load_image(file.getvalue()),
            "stock": lambda picture=picture: _stock(model, processor, picture),
            "ours": lambda picture=picture: _ours(vlm, picture),
        }
        ms: dict[str, list[float]] = {name: [] for name in ways}
        for index in range(-WARM_UP, repeats):
            for name, work in ways.items():
                spent = wall_ms(work, model.device)
                if index >= 0:
                    ms[name].append(spent)
        moved = to_device(picture, model.device)
        values = [
            processor.image_processor(image, return_tensors="pt", **options)["pixel_values"].cpu()
            for image, options in ((picture, {}), (moved, pixel_options(processor, model.device)))
        ]
        found.append(
            {
                "picture": list(size),
                "ms": {name: spread(each) for name, each in ms.items()},
                "largest_difference": float((values[0] - values[1]).abs().max()),
            }
        )
    return found


def _stock(model: Any, processor: Any, picture: Image.Image) -> Any:
    inputs = processor.apply_chat_template(
        [[user_message([picture], QUESTION)]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return inputs.to(model.device, dtype=model.dtype)


def _ours(vlm: VLM, picture: Image.Image) -> Any:
    return vlm._encode([[user_message([picture], QUESTION)]], Plan())
