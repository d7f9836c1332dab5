from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmefficient.errors import InputError
from mmefficient.images import load_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_halves() -> Image.Image:
    """Left half red, right half blue, 6 x 2."""
    image = Image.new("RGB", (6, 2), RED)
    image.paste(BLUE, (3, 0, 6, 2))
    return image


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = two_halves()
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image))
    array = np.asarray(image)
    sources = [
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        memoryview(path.read_bytes()),
        io.BytesIO(path.read_bytes()),
        image,
        array,
        array / 255.0,
        array.astype(np.uint16) * 257,
        np.moveaxis(array, -1, 0),
        torch.tensor(array).permute(2, 0, 1),
        torch.tensor(array),
        (torch.tensor(array).permute(2, 0, 1) / 255).to(torch.bfloat16).requires_grad_(),
    ]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), array), type(source)


def test_the_result_is_the_callers_own() -> None:
    image = two_halves()
    load_image(image).putpixel((0, 0), BLUE)
    assert image.getpixel((0, 0)) == RED


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn 90 degrees clockwise to view
    loaded = load_image(encoded(two_halves(), exif=exif))
    assert loaded.size == (2, 6)
    assert loaded.getpixel((0, 0)) == RED
    assert loaded.getpixel((0, 5)) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_is_composed_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    if mode == "P":
        palette = Image.new("P", (2, 2), 0)
        source: object = encoded(palette, transparency=0)
    elif mode == "PA":
        source = image.convert("P").convert("PA")
        source.putalpha(0)
    else:
        source = encoded(image.convert(mode))
    assert load_image(source).getpixel((0, 0)) == (255, 255, 255)  # type: ignore[arg-type]


def test_other_modes_become_sane_rgb() -> None:
    grey16 = Image.fromarray(np.full((2, 2), 32896, np.uint16))
    assert load_image(encoded(grey16)).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(grey16.convert("I")).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(Image.new("L", (2, 2), 90)).getpixel((0, 0)) == (90, 90, 90)
    assert load_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0))
    assert red > 240
    assert green < 15
    assert blue < 15


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(data).getpixel((0, 0)) == RED


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere.png", "There is no image at 'nowhere.png'"),
        (".", "is a folder"),
        ("https://example.org/cat.png", "download the picture"),
        ("null\0byte.png", "cannot be opened"),
        (b"", "not an image"),
        (b"a text file", "not an image"),
        (io.BytesIO(b"GIF89a"), "not an image"),
        (encoded(noise())[:2000], "damaged or incomplete"),
        (encoded(noise(), "JPEG")[:1500], "damaged or incomplete"),
        (png_header(10_000, 10_000), "more pixels than the safety limit"),
        (png_header(30_000, 30_000), "more pixels than the safety limit"),
        (np.zeros((0, 4, 3), np.uint8), "is not a picture"),
        (np.zeros((5, 5, 2), np.uint8), r"is not a picture; it must be \(H, W\[, C\]\)"),
        (np.zeros((1, 3, 4, 4), np.uint8), "is not a picture"),
        (torch.zeros(2, 5, 5), r"it must be \(\[C,\] H, W\)"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 3.0), r"pictures lie in \[0, 1\]"),
        (np.full((4, 4), np.nan), r"pictures lie in \[0, 1\]"),
        (7, "cannot be read from a int"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_images_get_one_sentence(source: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        load_image(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        load_image(tmp_path / "picture.png")
