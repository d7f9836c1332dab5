"""Kept visual tokens, drawn on the picture, from a report's provenance alone."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb

import torch
from PIL import Image, ImageDraw, ImageFont

from mmefficient.errors import InputError
from mmefficient.report import Report

SIDE = 252  # px: longer side of a panel
MARGIN, LINE, GAP = 10, 18, 4  # px; the gap is between the views of one picture
DIMMED = 0.22  # brightness of what has left
MERGED, TINT = 0.6, 0.35  # brightness of what was merged into another token; strength of a group's colour


def kept_tokens(picture: Image.Image, answers: Sequence[tuple[Report, str]], row: int = 0) -> Image.Image:
    """One strip per report, one panel per change of the kept set, titled with the layers and the count.

    A picture that was cut into tiles is drawn twice in every panel: as the overview has it, and as the tiles have it.

    Args:
        picture: RGB, as it was given to the processor. With an overview and tiles, both show the whole of it. A single
            view of other proportions is taken to be its centre, which is what CLIP's processor cuts out.
        answers: reports of runs on that picture, each with the text to print above its panels.
        row: row of the batch.

    Raises:
        InputError: the row holds no image, several images, or a video.
    """
    strips = [_strip(picture, report, text, row) for report, text in answers]
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return canvas


def kept_at(picture: Image.Image, report: Report, layer: int, row: int = 0) -> Image.Image:
    """What decoder layer `layer` holds of `picture`; arguments and errors as in `kept_tokens`.

    Tokens that were merged share a colour with the one that carries on their features, which alone is fully bright.
    """
    place = _place(report, row)
    held = torch.zeros(len(place), dtype=torch.bool)
    held[report.kept(row, layer)] = True
    light, group = held.float(), torch.full((len(place),), -1)
    if report.merged_into:
        into = report.merged_into[row]
        together = held[into] & (into.bincount(minlength=len(into)) > 1)[into]
        group[together] = into[together]
        light[together & ~held] = MERGED
    return _lit(picture, place, light, group)


def attention_at(picture: Image.Image, report: Report, received: torch.Tensor, row: int = 0) -> Image.Image:
    """`picture` lit by the attention [N] that its visual tokens receive; arguments and errors as in `kept_tokens`.

    The brightest token is shown as it is; the others fade to `DIMMED` with the square root of their share of it.
    """
    return _lit(picture, _place(report, row), (received / received.max().clamp(min=1e-12)).sqrt())


def _place(report: Report, row: int) -> torch.Tensor:
    place = report.places[row]
    if len(place[:, 0].unique()) != 1 or len(place[:, 1].unique()) > 2:
        raise InputError(f"row {row} does not hold exactly one image; only such pictures can be drawn.")
    return place


def _strip(picture: Image.Image, report: Report, text: str, row: int) -> Image.Image:
    _place(report, row)
    kept = report.rows[row].kept_per_layer
    starts = [0] + [layer for layer in range(1, len(kept)) if kept[layer] != kept[layer - 1]]
    panels = [kept_at(picture, report, start, row) for start in starts]
    each, height = panels[0].size
    width = len(starts) * (each + MARGIN) + MARGIN
    font = ImageFont.load_default(13)
    title = f"{report.plan}: {text}"
    width = max(width, int(font.getlength(title)) + 2 * MARGIN)
    strip = Image.new("RGB", (width, height + 2 * LINE + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(strip)
    pen.text((MARGIN, MARGIN), title, "black", font)
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(kept)], strict=True)):
        left = MARGIN + index * (each + MARGIN)
        layers = f"layer {start}" if end == start + 1 else f"layers {start}-{end - 1}"
        pen.text((left, MARGIN + LINE), f"{layers}: {kept[start]} tokens", "black", font)
        strip.paste(panels[index], (left, MARGIN + 2 * LINE))
    return strip


def _lit(
    picture: Image.Image, place: torch.Tensor, light: torch.Tensor, group: torch.Tensor | None = None
) -> Image.Image:
    """`picture` under the `light` in [0, 1] of its tokens [N], tinted by `group` (-1 = not), per view, side by side."""
    views = place[:, 1].unique().tolist()
    panels = []
    for view in views:
        chosen = (place[:, 1] == view) & (place[:, 2] >= 0)  # a CLS token has no place
        at = place[chosen, 2:]
        rows, cols = (at.amax(0) + 1).tolist()
        mask = torch.zeros(rows, cols)
        mask[at[:, 0], at[:, 1]] = light[chosen].float()
        seen = _whole(picture) if len(views) > 1 else _centre(picture, rows, cols)
        shade = Image.fromarray((mask * 255).to(torch.uint8).numpy()).resize(seen.size, Image.Resampling.NEAREST)
        panel = Image.composite(seen, seen.point(lambda value: int(value * DIMMED)), shade)
        if group is not None and bool((group[chosen] >= 0).any()):
            panel = _tinted(panel, rows, cols, at, group[chosen])
        panels.append(panel)
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    joined = Image.new("RGB", (width, panels[0].height), "white")
    for index, panel in enumerate(panels):
        joined.paste(panel, (index * (panel.width + GAP), 0))
    return joined


def _tinted(panel: Image.Image, rows: int, cols: int, at: torch.Tensor, group: torch.Tensor) -> Image.Image:
    """A colour per group [N] over its tokens at (row, col) `at` [N, 2]; -1 = none."""
    colour, where = Image.new("RGB", (cols, rows)), Image.new("L", (cols, rows))
    for (row, col), number in zip(at.tolist(), group.tolist(), strict=True):
        if number >= 0:
            hue = number * 0.618034 % 1  # neighbouring numbers get colours far apart
            colour.putpixel((col, row), tuple(round(255 * part) for part in hsv_to_rgb(hue, 0.9, 1.0)))
            where.putpixel((col, row), round(255 * TINT))
    near = Image.Resampling.NEAREST
    return Image.composite(colour.resize(panel.size, near), panel, where.resize(panel.size, near))


def _whole(picture: Image.Image) -> Image.Image:
    """The picture, its longer side `SIDE` px."""
    scale = SIDE / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def _centre(picture: Image.Image, rows: int, cols: int) -> Image.Image:
    """The centre of the picture in the proportions of a grid, its longer side `SIDE` px."""
    width, height = picture.size
    if width * rows > height * cols:
        width = max(1, round(height * cols / rows))
    else:
        height = max(1, round(width * rows / cols))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    scale = SIDE / max(rows, cols)
    size = (round(cols * scale), round(rows * scale))
    return picture.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
