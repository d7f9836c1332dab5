"""Pictures from a browser: checked by content, bounded in size and pixels, refused with a sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmefficient.errors import InputError, MMEfficientError
from mmefficient.images import load_image

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
SIDE = 1344  # px: longer side kept; more than any supported model reads of one tile
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def read_picture(data: bytes) -> Image.Image:
    """An uploaded file as RGB, its longer side at most `SIDE` px.

    Raises:
        InputError: too many bytes or pixels, or not one of `FORMATS` by its content, whatever its name says.
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"The picture has {len(data) / 2**20:.0f} MiB; {MAX_BYTES // 2**20} MiB are allowed.")
    picture = load_image(_within_limits(data))
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return picture


def _within_limits(data: bytes) -> bytes:
    """The same bytes, after a look at the header alone."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        width, height = MAX_PIXELS, 2
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"The file is not a picture in one of the formats {', '.join(FORMATS)}.") from error
    if width * height > MAX_PIXELS:
        raise InputError(f"The picture has more than {MAX_PIXELS // 10**6} million pixels; give a smaller one.")
    return data


def picture_input(**options: Any) -> gr.Image:
    """A `gr.Image` whose value is a checked `PIL.Image`; Gradio's own decoding would fail without a sentence."""
    component = gr.Image(type="pil", sources=["upload", "clipboard"], format="png", **options)
    # on the instance: a subclass would make Gradio write a stub file beside this module
    component.preprocess = _checked  # type: ignore[method-assign]
    return component


def _checked(payload: Any) -> Image.Image | None:
    if payload is None:
        return None
    if not payload.path:  # data: addresses are for pictures that never came through the upload
        raise gr.Error("Upload the picture; addresses are not read.", print_exception=False)
    try:
        return read_picture(Path(payload.path).read_bytes())
    except MMEfficientError as error:
        raise gr.Error(str(error), print_exception=False) from error
