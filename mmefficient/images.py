"""Any picture a caller may hold, as one RGB `PIL.Image`: upright, 8 bits per channel, first frame, no transparency."""

from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps

from mmefficient.errors import InputError

Encoded = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
ImageSource = Encoded | Image.Image | np.ndarray | torch.Tensor

_CHANNELS = (1, 3, 4)
_WARNING_FILTER = threading.Lock()  # warnings.catch_warnings changes process-wide state


def load_image(source: ImageSource) -> Image.Image:
    """Read `source` and return an RGB image of its own (never a view of the caller's).

    `source` is a path, encoded bytes, a binary file, a PIL image, a numpy array (H, W[, C]) or a torch tensor
    ([C,] H, W), with C of 1, 3 or 4; the other channel order is accepted where it is unambiguous. Arrays hold uint8 or
    bool, uint16 (full range), or floats in [0, 1].

    The EXIF orientation is applied, transparency is composed over white, 16-bit grey is scaled by 1/257, and of an
    animation the first frame is taken. Pillow's limit against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`)
    is an error here, not a warning.

    Raises:
        InputError: nothing at the path, not an image, damaged, truncated, too large, or an array no picture has.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "The given image")
    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), channels_first=True)
    if isinstance(source, np.ndarray):
        return _from_array(source, channels_first=False)
    if isinstance(source, str | os.PathLike):
        return _from_path(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), "The given bytes")
    if hasattr(source, "read"):
        return _decode(source, f"The file {getattr(source, 'name', 'object')!r}")
    raise InputError(
        f"An image cannot be read from a {type(source).__name__}; "
        "give a path, bytes, a binary file, a PIL image, a numpy array or a torch tensor."
    )


def to_device(image: Image.Image, device: torch.device) -> torch.Tensor:
    """The RGB picture as uint8 [3, H, W] on `device`: copied as it lies in memory, put in order there."""
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1).contiguous()


def _from_path(source: str | os.PathLike[str]) -> Image.Image:
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        raise InputError(f"{name!r} is a web address; download the picture and give the path of the file.")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            raise InputError(f"{name!r} is a folder, not an image; give the path of one picture.")
        with path.open("rb") as file:
            return _decode(file, repr(name))
    except FileNotFoundError:
        raise InputError(f"There is no image at {name!r}; check the path.") from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a null byte, no home folder, ...
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name!r} cannot be opened ({error}); check the path and its permissions.") from error


def _decode(file: IO[bytes], name: str) -> Image.Image:
    try:
        with _WARNING_FILTER, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)  # reads the header only
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(name) from error
    except Exception as error:  # Pillow's format plug-ins raise many types on data that is not theirs
        raise InputError(f"{name} is not an image that can be read; give a PNG, JPEG, WebP or similar file.") from error
    with image:
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} is {image.width} x {image.height} pixels and so empty; give a picture.")
    try:
        return _flatten(ImageOps.exif_transpose(image))  # which is a copy, turned or not
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(name) from error
    except Exception as error:  # as above, now for damaged pixel data or metadata
        raise InputError(f"{name} is damaged or incomplete ({error}); save or download it again.") from error


def _bomb(name: str) -> InputError:
    return InputError(
        f"{name} has more pixels than the safety limit of {Image.MAX_IMAGE_PIXELS:,}; give a smaller picture "
        "(or raise PIL.Image.MAX_IMAGE_PIXELS if you trust its origin)."
    )


def _flatten(image: Image.Image) -> Image.Image:
    """8-bit RGB without transparency; the image itself where it is that already."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        grey = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB") if image.mode != "RGB" else image


def _from_array(array: np.ndarray, channels_first: bool) -> Image.Image:
    shape = tuple(array.shape)
    first, last = (len(shape) == 3 and shape[axis] in _CHANNELS for axis in (0, -1))
    if 0 in shape or not (len(shape) == 2 or first or last):
        order = "([C,] H, W)" if channels_first else "(H, W[, C])"
        raise InputError(f"An array of shape {shape} is not a picture; it must be {order} with C of 1, 3 or 4.")
    if first and (channels_first or not last):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return _flatten(Image.fromarray(np.ascontiguousarray(_to_bytes(array))).copy())


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype == np.uint16:
        return (array / 257).round().astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"An array of {array.dtype} is not a picture; use uint8, uint16, bool, or floats in [0, 1].")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"Float pictures lie in [0, 1], this one spans [{low:g}, {high:g}]; scale it or use uint8.")
    return (array * 255).round().astype(np.uint8)
