"""Draw every sprite and word once from its font: ``python -m mmefficient.models.reference.scenes.build_atlas``.

Needs the Debian packages ``fonts-noto-color-emoji`` and ``fonts-dejavu-core``; nothing at run time does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from .catalogue import SPRITES, WORDS, Sprite
from .render import ATLAS

EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
WORD_FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf"
STRIKE = 109  # px: the one size in which the bitmap emoji font exists
MASTER = 112  # px: longer side of a sprite in the atlas
WORD_SIZE = 44  # px: font size at which a capital is 32 px high
SHEET = 1536  # px: width of the sheets


def _turn_hue(image: Image.Image, hue: int) -> Image.Image:
    """Turn the hue of all but near-grey pixels by ``hue``/256 of the colour circle."""
    h, s, v = image.convert("RGB").convert("HSV").split()
    turned = Image.merge("HSV", (h.point([(i + hue) % 256 for i in range(256)]), s, v)).convert("RGB")
    turned.putalpha(image.getchannel("A"))
    return turned


def _crop(image: Image.Image, alpha: Image.Image) -> Image.Image:
    # A stray antialiased pixel of alpha 1 would widen the box: what counts is what can be seen.
    box = alpha.point([255 * (level >= 16) for level in range(256)]).getbbox()
    if box is None:
        raise ValueError("The font draws nothing for this character; check the version of the font package.")
    return image.crop(box)


def draw_sprite(sprite: Sprite, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji as RGBA, cropped to what is visible, its longer side ``MASTER`` px."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((20, 20), sprite.emoji, font=font, embedded_color=True)
    image = _crop(canvas, canvas.getchannel("A"))
    longer = max(image.size)
    size = tuple(max(1, (side * MASTER + longer // 2) // longer) for side in image.size)
    image = image.convert("RGBa").resize((size[0], size[1]), Image.Resampling.BOX).convert("RGBA")
    return _turn_hue(image, sprite.hue) if sprite.hue else image


def draw_word(word: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One word in capitals as an 8-bit coverage mask, cropped left and right but of the font's full capital height."""
    mask = Image.new("L", (8 * WORD_SIZE, 2 * WORD_SIZE))
    ImageDraw.Draw(mask).text((10, WORD_SIZE), word.upper(), fill=255, font=font, anchor="ls")
    left, _, right, _ = mask.getbbox() or (0, 0, 1, 1)
    # 16 levels of coverage are plenty for print and halve the file.
    return mask.crop((left, WORD_SIZE - 33, right, WORD_SIZE + 1)).point([(i + 8) // 17 * 17 for i in range(256)])


def pack(images: Sequence[Image.Image], mode: str) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Lay images out in shelves of width ``SHEET``; returns the sheet and one (left, top, width, height) each."""
    rects: list[tuple[int, int, int, int]] = []
    left = top = shelf = 0
    for image in images:
        if left + image.width > SHEET:
            left, top, shelf = 0, top + shelf, 0
        rects.append((left, top, image.width, image.height))
        left, shelf = left + image.width, max(shelf, image.height)
    sheet = Image.new(mode, (SHEET, top + shelf))
    for image, (x, y, _, _) in zip(images, rects, strict=True):
        sheet.paste(image, (x, y))
    return sheet, rects


def main(target: Path = ATLAS) -> None:
    """Write ``sprites.png``, ``words.png`` and ``index.json`` into ``target``."""
    emoji = ImageFont.truetype(EMOJI_FONT, STRIKE, layout_engine=ImageFont.Layout.BASIC)
    bold = ImageFont.truetype(WORD_FONT, WORD_SIZE, layout_engine=ImageFont.Layout.BASIC)
    sprites, sprite_rects = pack([draw_sprite(sprite, emoji) for sprite in SPRITES], "RGBA")
    words, word_rects = pack([draw_word(word, bold) for word in WORDS], "L")
    # Colour under full transparency is never seen; clearing it lets the file compress.
    opaque = sprites.getchannel("A").point([255 * (level > 0) for level in range(256)])
    cleared = Image.merge("RGB", [ImageChops.multiply(band, opaque) for band in sprites.split()[:3]])
    cleared.putalpha(sprites.getchannel("A"))
    cleared.save(target / "sprites.png", optimize=True)
    words.save(target / "words.png", optimize=True)
    index = {"sprites": sprite_rects, "words": word_rects}
    (target / "index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
