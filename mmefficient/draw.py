"""Kept visual tokens, drawn on the picture, from a report's provenance alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from mmefficient.errors import InputError
from mmefficient.report import Report

SIDE = 252  # px: longer side of a panel
MARGIN, LINE = 10, 18  # px
DIMMED = 0.22  # brightness of what has left


def kept_tokens(picture: Image.Image, answers: Sequence[tuple[Report, str]], row: int = 0) -> Image.Image:
    """One strip per report, one panel per change of the kept set, titled with the layers and the count.

    Args:
        picture: RGB, as it was given to the processor. A processor that crops is taken to crop the centre to the
            proportions of the grid, as CLIP's does.
        answers: reports of runs on that picture, each with the text to print above its panels.
        row: row of the batch.

    Raises:
        InputError: the row holds no image, several images, or an image cut into tiles.
    """
    strips = [_strip(picture, report, text, row) for report, text in answers]
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return canvas


def kept_at(picture: Image.Image, report: Report, layer: int, row: int = 0) -> Image.Image:
    """What decoder layer `layer` holds of `picture`; arguments and errors as in `kept_tokens`."""
    place = _place(report, row)
    return _panel(_cropped(picture, place), place, report.kept(row, layer))


def attention_at(picture: Image.Image, report: Report, received: torch.Tensor, row: int = 0) -> Image.Image:
    """`picture` lit by the attention [N] that its visual tokens receive; arguments and errors as in `kept_tokens`.

    The brightest token is shown as it is; the others fade to `DIMMED` with the square root of their share of it.
    """
    place = _place(report, row)
    rows, cols = _grid(place)
    light = torch.zeros(rows, cols)
    light[place[:, 2], place[:, 3]] = (received / received.max().clamp(min=1e-12)).sqrt()
    seen = _cropped(picture, place)
    mask = Image.fromarray((light * 255).to(torch.uint8).numpy()).resize(seen.size, Image.Resampling.NEAREST)
    return Image.composite(seen, seen.point(lambda value: int(value * DIMMED)), mask)


def _place(report: Report, row: int) -> torch.Tensor:
    place = report.places[row]
    if len(place[:, :2].unique(dim=0)) != 1:
        raise InputError(f"row {row} does not hold exactly one untiled image; only such pictures can be drawn.")
    return place


def _strip(picture: Image.Image, report: Report, text: str, row: int) -> Image.Image:
    place = _place(report, row)
    kept = report.rows[row].kept_per_layer
    starts = [0] + [layer for layer in range(1, len(kept)) if kept[layer] != kept[layer - 1]]
    seen = _cropped(picture, place)
    width = len(starts) * (seen.width + MARGIN) + MARGIN
    font = ImageFont.load_default(13)
    title = f"{report.plan}: {text}"
    width = max(width, int(font.getlength(title)) + 2 * MARGIN)
    strip = Image.new("RGB", (width, seen.height + 2 * LINE + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(strip)
    pen.text((MARGIN, MARGIN), title, "black", font)
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(kept)], strict=True)):
        left = MARGIN + index * (seen.width + MARGIN)
        layers = f"layer {start}" if end == start + 1 else f"layers {start}-{end - 1}"
        pen.text((left, MARGIN + LINE), f"{layers}: {kept[start]} tokens", "black", font)
        panel = _panel(seen, place, report.kept(row, start))
        strip.paste(panel, (left, MARGIN + 2 * LINE))
    return strip


def _grid(place: torch.Tensor) -> tuple[int, int]:
    rows, cols = (place[:, 2:].amax(0) + 1).tolist()
    return rows, cols


def _cropped(picture: Image.Image, place: torch.Tensor) -> Image.Image:
    """The part of the picture that the grid covers, its longer side `SIDE` px."""
    rows, cols = _grid(place)
    width, height = picture.size
    if width * rows > height * cols:
        width = max(1, round(height * cols / rows))
    else:
        height = max(1, round(width * rows / cols))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    scale = SIDE / max(rows, cols)
    size = (round(cols * scale), round(rows * scale))
    return picture.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))


def _panel(seen: Image.Image, place: torch.Tensor, kept: torch.Tensor) -> Image.Image:
    rows, cols = _grid(place)
    mask = torch.zeros(rows, cols, dtype=torch.uint8)
    at = place[kept]
    mask[at[:, 2], at[:, 3]] = 255
    light = Image.fromarray(mask.numpy()).resize(seen.size, Image.Resampling.NEAREST)
    return Image.composite(seen, seen.point(lambda value: int(value * DIMMED)), light)
