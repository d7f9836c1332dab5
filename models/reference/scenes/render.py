"""Draw scenes as pixels: integer arithmetic in plain torch ops, so that all devices agree bit for bit.

A *layer* is ``(key, x0, y0)``: what to draw and where its left upper corner goes, in px; it may hang over the border.
A *key* names one sprite at one size, or one word at one size and style. ``Keys`` holds the arithmetic of keys and the
sizes of their boxes, from the index alone; only ``load_atlas`` touches pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mmefficient.errors import InputError

ATLAS = Path(__file__).resolve().parent / "atlas"
CANVAS = 336  # px: both sides of every picture
SIZES = (24, 27, 31, 35, 39, 44, 50, 56, 64, 72, 81, 92, 104, 118, 133, 150)  # px: a sprite's longer side
WORD_HEIGHTS = (18, 24, 32)  # px: a printed word's height, plate aside
STYLES = (  # (ink, plate) of a printed word
    ((0, 0, 0), (255, 255, 255)),
    ((255, 255, 255), (24, 24, 24)),
    ((176, 16, 16), (255, 240, 200)),
    ((255, 236, 64), (16, 56, 144)),
)
MARGIN = 4  # px of plate on every side of a word
BACKGROUNDS = ("solid", "vertical", "horizontal", "diagonal", "checker", "stripes", "noise")
EMPTY = -1  # the key of a layer that draws nothing


@dataclass(frozen=True)
class Keys:
    """Arithmetic of layer keys. All methods take ints or integer arrays (numpy or torch) alike and check no range.

    ``widths`` and ``heights`` are int32 arrays [keys], in px, indexed by key.
    """

    sprites: int
    words: int
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]

    def sprite_key(self, sprite_id: Any, size_index: Any) -> Any:
        """Key of sprite ``sprite_id`` (an index into ``catalogue.SPRITES``) with longer side ``SIZES[size_index]``."""
        return sprite_id * len(SIZES) + size_index

    def word_key(self, word_id: Any, size_index: Any, style: Any) -> Any:
        """Key of word ``word_id`` (an index into ``catalogue.WORDS``) at ``WORD_HEIGHTS[size_index]`` px."""
        return self.sprites * len(SIZES) + (word_id * len(WORD_HEIGHTS) + size_index) * len(STYLES) + style


@dataclass(frozen=True)
class Atlas:
    """Pixels of every key, on one device.

    pixels  int32 [P]; one premultiplied pixel each: bits 0-7 red, 8-15 green, 16-23 blue, 24-31 alpha.
            Pixel 0 is transparent; it is what lies outside every sprite.
    boxes   int32 [keys + 1, 3]; offset into ``pixels``, width, height. The last row, which key -1 reaches, is empty.
    keys    the arithmetic of keys
    """

    pixels: Tensor
    boxes: Tensor
    keys: Keys


def _index() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    index = json.loads((ATLAS / "index.json").read_text())
    return np.asarray(index["sprites"], np.int64), np.asarray(index["words"], np.int64)


@lru_cache(maxsize=1)
def load_keys() -> Keys:
    """Key arithmetic and box sizes, from the index file alone (no pixels: cheap enough for a data-loading worker)."""
    sprites, words = _index()
    sides = sprites[:, None, 2:]  # [sprites, 1, (width, height)]
    longer = sides.max(-1, keepdims=True)
    scaled = np.maximum(1, (sides * np.array(SIZES)[:, None] + longer // 2) // longer)
    sides = words[:, None, 2:]
    printed = (sides * np.array(WORD_HEIGHTS)[:, None] + sides[..., 1:] // 2) // sides[..., 1:] + 2 * MARGIN
    boxes = np.concatenate([scaled.reshape(-1, 2), printed.reshape(-1, 2).repeat(len(STYLES), 0)]).astype(np.int32)
    return Keys(len(sprites), len(words), boxes[:, 0].copy(), boxes[:, 1].copy())


def _scaled_sprites(keys: Keys) -> list[npt.NDArray[np.uint8]]:
    """RGBA premultiplied pixels [n, 4] of every sprite key in order."""
    rects, _ = _index()
    with Image.open(ATLAS / "sprites.png") as file:
        sheet = file.convert("RGBa")
    out: list[npt.NDArray[np.uint8]] = []
    for sprite, (x, y, w, h) in enumerate(rects.tolist()):
        master = sheet.crop((x, y, x + w, y + h))
        first = keys.sprite_key(sprite, 0)
        for size in zip(keys.widths[first : first + len(SIZES)], keys.heights[first : first + len(SIZES)], strict=True):
            # BILINEAR has no negative lobes, so premultiplied colour never exceeds alpha and blending cannot overflow.
            out.append(np.asarray(master.resize(size, Image.Resampling.BILINEAR)).reshape(-1, 4))
    return out


def _printed_words(keys: Keys) -> list[npt.NDArray[np.uint8]]:
    """RGBA pixels [n, 4] of every word key in order: ink over an opaque plate."""
    _, rects = _index()
    ink, plate = np.array(STYLES).transpose(1, 0, 2)[:, :, None]  # [styles, 1, rgb] each
    cover = np.arange(256)[:, None]
    mixed = np.full((len(STYLES), 256, 4), 255, np.uint8)  # the pixel of every style and coverage
    mixed[..., :3] = (ink * cover + plate * (255 - cover) + 127) // 255
    out: list[npt.NDArray[np.uint8]] = []
    with Image.open(ATLAS / "words.png") as file:
        sheet = file.convert("L")
    for word, (x, y, w, h) in enumerate(rects.tolist()):
        master = sheet.crop((x, y, x + w, y + h))
        for size in range(len(WORD_HEIGHTS)):
            key = keys.word_key(word, size, 0)
            inner = (keys.widths[key] - 2 * MARGIN, keys.heights[key] - 2 * MARGIN)
            mask = np.pad(np.asarray(master.resize(inner, Image.Resampling.BILINEAR)), MARGIN)
            out.extend(mixed[:, mask.reshape(-1)])
    return out


def load_atlas(device: str | torch.device = "cpu") -> Atlas:
    """Scale all sprites and words to all sizes and put the pixels (110 MB) on ``device``: about a second, once each."""
    return _load_atlas(str(torch.device(device)))


@lru_cache(maxsize=4)
def _load_atlas(device: str) -> Atlas:
    keys = load_keys()
    blocks = [np.array([[0, 0, 0, 0]], np.uint8), *_scaled_sprites(keys), *_printed_words(keys)]
    packed = np.concatenate(blocks).view("<i4")[:, 0]
    area = keys.widths * keys.heights
    offsets = 1 + np.cumsum(area) - area
    boxes = np.zeros((len(area) + 1, 3), np.int32)
    boxes[:-1] = np.stack([offsets, keys.widths, keys.heights], 1)
    pixels = torch.from_numpy(packed.astype(np.int32, copy=False))
    return Atlas(pixels.to(device), torch.from_numpy(boxes).to(device), keys)


def _over_255(x: Tensor) -> Tensor:
    """x / 255 to the nearest integer, exactly, for 0 <= x <= 255²."""
    return (x * 257 + 0x8080) >> 16


def _hash(x: Tensor, y: Tensor, seed: Tensor) -> Tensor:
    """A level 0..255 for every lattice point; all intermediate values stay below 2³¹."""
    h = (x * 73 + y * 151 + seed * 89) & 0xFFFF
    h = (h * 25173 + 13849) & 0xFFFF
    h = h ^ (h >> 7)
    return ((h * 25173 + 13849) & 0xFFFF) >> 8


def _background(background: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    kind, ar, ag, ab, br, bg, bb, look = (column[:, None, None] for column in background.unbind(1))
    period, phase = (look & 255).clamp(min=1), look >> 8
    u, v = x + phase, y + phase
    cell_x, cell_y = u // period, v // period
    fx, fy = u % period * 256 // period, v % period * 256 // period
    upper = _hash(cell_x, cell_y, phase) * (256 - fx) + _hash(cell_x + 1, cell_y, phase) * fx
    lower = _hash(cell_x, cell_y + 1, phase) * (256 - fx) + _hash(cell_x + 1, cell_y + 1, phase) * fx
    last = CANVAS - 1
    weights = (
        y * 255 // last,
        x * 255 // last,
        (x + y) * 255 // (2 * last),
        ((cell_x + cell_y) & 1) * 255,
        ((u + v) // period & 1) * 255,
        (upper * (256 - fy) + lower * fy) >> 16,
    )
    weight = torch.zeros_like(kind)
    for number, candidate in enumerate(weights, 1):
        weight = torch.where(kind == number, candidate, weight)
    weight = weight.expand(-1, CANVAS, CANVAS)
    return [_over_255(a * (255 - weight) + b * weight) for a, b in ((ar, br), (ag, bg), (ab, bb))]


def _layer_pixels(layers: Tensor, k: int, x: Tensor, y: Tensor, atlas: Atlas) -> Tensor:
    """What layer ``k`` of each picture puts at every pixel: packed int32 [B, 336, 336]."""
    key, x0, y0 = (column[:, None, None] for column in layers[:, k].unbind(1))
    offset, width, height = atlas.boxes[torch.where(key < 0, atlas.boxes.shape[0] - 1, key)].unbind(-1)
    column, row = x - x0, y - y0
    in_column, in_row = (column >= 0) & (column < width), (row >= 0) & (row < height)
    # Products of one row and one column factor, and a one-dimensional gather: several times quicker in eager mode than
    # a mask, a select and a two-dimensional index.
    index = (offset + row * width + column) * in_column.to(torch.int32) * in_row.to(torch.int32)
    return atlas.pixels.index_select(0, index.reshape(-1)).view(index.shape)


def _axes(layers: Tensor, atlas: Atlas) -> tuple[Tensor, Tensor]:
    if layers.dim() != 3 or layers.shape[2] != 3:
        raise InputError(f"layers have the shape {tuple(layers.shape)}; give [B, K, 3] of (key, x0, y0).")
    if layers.device != atlas.pixels.device:
        raise InputError(f"layers are on {layers.device} but the atlas is on {atlas.pixels.device}; load it there.")
    axis = torch.arange(CANVAS, dtype=torch.int32, device=layers.device)
    return axis[None, None, :], axis[None, :, None]


def render(layers: Tensor, background: Tensor, atlas: Atlas) -> Tensor:
    """Draw B pictures of the same number of layers; one formula everywhere, and ``torch.compile`` fuses it whole.

    layers      integer [B, K, 3]: (key, x0, y0), drawn in order, later ones over earlier ones; key -1 draws nothing.
                A key beyond the atlas is an indexing error (on a GPU: a device-side assertion).
    background  integer [B, 8]: kind (index into ``BACKGROUNDS``), colour A (r, g, b), colour B (r, g, b), and
                period + 256 * phase with period 1..255 px and phase 0..4095 px (it also seeds the noise).
                Keep A and B within about 80 levels of each other, or small sprites drown in the pattern.
    returns     uint8 [B, 3, 336, 336], RGB.
    raises      InputError for a wrong shape, or layers on another device than the atlas.

    Each layer is composited in 8 bits: ``out = colour + round(below * (255 - alpha) / 255)``, colour premultiplied.
    """
    x, y = _axes(layers, atlas)
    if background.shape != (layers.shape[0], 8):
        raise InputError(f"background has the shape {tuple(background.shape)}; give [{layers.shape[0]}, 8].")
    layers = layers.to(torch.int32)
    canvas = _background(background.to(torch.int32), x, y)
    for k in range(layers.shape[1]):
        pixel = _layer_pixels(layers, k, x, y, atlas)
        through = ~pixel >> 24 & 255
        canvas = [(pixel >> shift & 255) + _over_255(c * through) for c, shift in zip(canvas, (0, 8, 16), strict=True)]
    return torch.stack(canvas, 1).to(torch.uint8)


def label_map(layers: Tensor, labels: Tensor, atlas: Atlas) -> Tensor:
    """Which object each pixel shows: the label of the topmost layer at least half opaque there, else -1.

    layers  integer [B, K, 3] as for ``render``;  labels  integer [B, K], below 32768
    returns int16 [B, 336, 336];  raises InputError as ``render`` does, or when the two shapes differ.
    """
    x, y = _axes(layers, atlas)
    if labels.shape != layers.shape[:2]:
        raise InputError(f"labels have the shape {tuple(labels.shape)}; give {list(layers.shape[:2])}, one per layer.")
    layers, labels = layers.to(torch.int32), labels.to(torch.int16)
    out = torch.full((layers.shape[0], CANVAS, CANVAS), -1, dtype=torch.int16, device=layers.device)
    for k in range(layers.shape[1]):
        seen = _layer_pixels(layers, k, x, y, atlas) < 0  # the sign bit is the highest bit of alpha
        out = torch.where(seen, labels[:, k, None, None], out)
    return out
