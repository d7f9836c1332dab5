from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmefficient.errors import InputError
from mmefficient.models.reference.scenes import render as module
from mmefficient.models.reference.scenes.catalogue import SPRITES, WORDS
from mmefficient.models.reference.scenes.render import (
    ATLAS,
    BACKGROUNDS,
    CANVAS,
    EMPTY,
    MARGIN,
    SIZES,
    STYLES,
    WORD_HEIGHTS,
    Atlas,
    label_map,
    load_atlas,
    load_keys,
    render,
)

Picture = npt.NDArray[np.int64]
GREY = [0, 90, 100, 110, 0, 0, 0, 32]
DIGEST = "e808cf27814511aacf1be3a6e24826d4b5cac6296e2a25ea641b53c8a59fd347"


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return load_atlas()


def scenes(batch: int, layers: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random layers, some empty and some over the border, on every kind of background in turn."""
    rng = np.random.default_rng(seed)
    keys = load_keys()
    key = rng.integers(-1, len(keys.widths), (batch, layers))
    key[:, ::2] = keys.sprite_key(rng.integers(keys.sprites, size=key[:, ::2].shape), rng.integers(len(SIZES)))
    place = rng.integers(-60, CANVAS, (batch, layers, 2))
    colours = rng.integers(0, 256, (batch, 6))
    look = rng.integers(5, 120, batch) + 256 * rng.integers(0, 4096, batch)
    kinds = np.arange(batch) % len(BACKGROUNDS)
    background = np.concatenate([kinds[:, None], colours, look[:, None]], 1)
    return torch.from_numpy(np.concatenate([key[..., None], place], -1)).int(), torch.from_numpy(background).int()


def master(kind: str, number: int) -> Image.Image:
    x, y, w, h = json.loads((ATLAS / "index.json").read_text())[kind][number]
    with Image.open(ATLAS / f"{kind}.png") as sheet:
        return sheet.crop((x, y, x + w, y + h))


def stamp(key: int) -> Picture:
    """Premultiplied RGBA [h, w, 4] of a key, from the master sheets by way of Pillow alone."""
    keys = load_keys()
    width, height = int(keys.widths[key]), int(keys.heights[key])
    if key < keys.sprites * len(SIZES):
        image = master("sprites", key // len(SIZES)).convert("RGBa").resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).astype(np.int64)
    rest, style = divmod(key - keys.sprites * len(SIZES), len(STYLES))
    inner = (width - 2 * MARGIN, height - 2 * MARGIN)
    mask = Image.new("L", (width, height))
    mask.paste(master("words", rest // len(WORD_HEIGHTS)).resize(inner, Image.Resampling.BILINEAR), (MARGIN, MARGIN))
    ink, plate = (np.array(colour) for colour in STYLES[style])
    cover = np.asarray(mask).astype(np.int64)[..., None]
    rgb = np.rint((ink * cover + plate * (255 - cover)) / 255).astype(np.int64)
    return np.concatenate([rgb, np.full_like(cover, 255)], -1)


def compose(layers: Tensor, below: Picture) -> Picture:
    """The documented formula, layer by layer on the part of the canvas each covers; below and result [336, 336, 3]."""
    out = below.copy()
    for key, x0, y0 in layers.tolist():
        if key == EMPTY:
            continue
        pixels = stamp(key)
        pixels = pixels[max(0, -y0) : CANVAS - y0, max(0, -x0) : CANVAS - x0]
        top, left = max(0, y0), max(0, x0)
        part = out[top : top + pixels.shape[0], left : left + pixels.shape[1]]
        part[:] = pixels[..., :3] + np.rint(part * (255 - pixels[..., 3:]) / 255).astype(np.int64)
    return out


def test_pictures_equal_an_independent_composition(atlas: Atlas) -> None:
    layers, background = scenes(7, 9)
    pictures = render(layers, background, atlas)
    plain = render(layers[:, :0], background, atlas)
    assert pictures.shape == (7, 3, CANVAS, CANVAS)
    assert pictures.dtype == torch.uint8
    for picture, below, these in zip(pictures, plain, layers, strict=True):
        expected = compose(these, below.permute(1, 2, 0).numpy().astype(np.int64))
        np.testing.assert_array_equal(picture.permute(1, 2, 0).numpy(), expected)


def test_division_by_255_is_exact() -> None:
    values = torch.arange(255 * 255 + 1, dtype=torch.int32)
    assert torch.equal(module._over_255(values), (values.double() / 255).round().int())


def test_a_batch_equals_single_pictures_and_padding_changes_nothing(atlas: Atlas) -> None:
    layers, background = scenes(7, 5, seed=1)
    padding = torch.tensor([EMPTY, 7, -900], dtype=torch.int32).expand(7, 2, 3)
    together = render(torch.cat([padding, layers, padding], 1), background, atlas)
    for b in range(7):
        assert torch.equal(together[b : b + 1], render(layers[b : b + 1], background[b : b + 1], atlas))


def test_layers_far_outside_draw_nothing(atlas: Atlas) -> None:
    background = torch.tensor([GREY])
    plain = render(torch.zeros(1, 0, 3, dtype=torch.int32), background, atlas)
    for x0, y0 in ((-151, 0), (0, -151), (CANVAS, 0), (0, CANVAS), (-10_000, 10_000)):
        assert torch.equal(render(torch.tensor([[[15, x0, y0]]]), background, atlas), plain)
    assert plain[0, :, 200, 17].tolist() == GREY[1:4]


@pytest.mark.parametrize("kind", range(len(BACKGROUNDS)))
def test_backgrounds_run_between_their_two_colours(kind: int, atlas: Atlas) -> None:
    first, second = (60, 90, 120), (100, 80, 180)
    background = torch.tensor([[kind, *first, *second, 24 + 256 * 5]])
    picture = render(torch.zeros(1, 0, 3, dtype=torch.int32), background, atlas)[0].permute(1, 2, 0).int()
    low, high = torch.tensor([first, second]).aminmax(dim=0)
    assert ((picture >= low) & (picture <= high)).all()
    seen = {tuple(colour) for colour in picture.view(-1, 3).unique(dim=0).tolist()}
    expected = {"solid": {first}, "checker": {first, second}, "stripes": {first, second}}
    assert seen == expected[BACKGROUNDS[kind]] if BACKGROUNDS[kind] in expected else len(seen) > 20
    if BACKGROUNDS[kind] in ("vertical", "horizontal", "diagonal"):
        assert tuple(picture[0, 0].tolist()) == first
        assert tuple(picture[-1, -1].tolist()) == second


def test_label_map_names_the_topmost_layer_that_is_at_least_half_opaque(atlas: Atlas) -> None:
    layers, _ = scenes(3, 8, seed=2)
    labels = torch.arange(24).view(3, 8) * 7
    result = label_map(layers, labels, atlas)
    assert result.dtype == torch.int16
    for these, names, found in zip(layers, labels, result, strict=True):
        expected = np.full((CANVAS, CANVAS), -1)
        for (key, x0, y0), name in zip(these.tolist(), names.tolist(), strict=True):
            if key != EMPTY:
                alpha = stamp(key)[max(0, -y0) : CANVAS - y0, max(0, -x0) : CANVAS - x0, 3]
                top, left = max(0, y0), max(0, x0)
                expected[top : top + alpha.shape[0], left : left + alpha.shape[1]][alpha >= 128] = name
        np.testing.assert_array_equal(found.numpy(), expected)


def test_key_tables_agree_with_the_scaled_pixels(atlas: Atlas) -> None:
    keys = load_keys()
    assert (keys.sprites, keys.words) == (len(SPRITES), len(WORDS))
    assert len(keys.widths) == keys.sprites * len(SIZES) + keys.words * len(WORD_HEIGHTS) * len(STYLES)
    offset, width, height = atlas.boxes[:-1].unbind(1)
    np.testing.assert_array_equal(width, keys.widths)
    np.testing.assert_array_equal(height, keys.heights)
    assert torch.equal(offset[1:], (offset + width * height)[:-1])
    assert int(offset[-1] + width[-1] * height[-1]) == atlas.pixels.numel()
    assert atlas.boxes[-1].tolist() == [0, 0, 0]
    sprite = np.arange(keys.sprites)[:, None]
    sized = keys.sprite_key(sprite, np.arange(len(SIZES)))
    np.testing.assert_array_equal(np.maximum(keys.widths, keys.heights)[sized], np.broadcast_to(SIZES, sized.shape))
    for size, capital in enumerate(WORD_HEIGHTS):
        assert keys.heights[keys.word_key(3, size, 0)] == capital + 2 * MARGIN
    last = keys.word_key(keys.words - 1, len(WORD_HEIGHTS) - 1, len(STYLES) - 1)
    assert last == len(keys.widths) - 1


def test_premultiplied_colour_never_exceeds_alpha(atlas: Atlas) -> None:
    pixels = atlas.pixels.view(torch.uint8).view(-1, 4)
    assert (pixels[:, :3].amax(1) <= pixels[:, 3]).all()


def test_the_atlas_is_small_and_carries_its_licences() -> None:
    assert sum(file.stat().st_size for file in ATLAS.iterdir()) <= 2 * 2**20
    assert "SIL OPEN FONT LICENSE Version 1.1" in (ATLAS / "OFL.txt").read_text()
    assert "Bitstream Vera" in (ATLAS / "DEJAVU.txt").read_text()


def test_the_compiled_form_has_no_graph_break_and_gives_the_same_picture(atlas: Atlas) -> None:
    layers, background = scenes(2, 4, seed=3)
    compiled = torch.compile(render, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(layers, background, atlas), render(layers, background, atlas))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_pictures(atlas: Atlas) -> None:
    layers, background = scenes(14, 9, seed=4)
    labels = torch.arange(9).expand(14, 9)
    there = load_atlas("cuda")
    compiled = torch.compile(render, fullgraph=True)
    for function in (render, compiled):
        assert torch.equal(function(layers.cuda(), background.cuda(), there).cpu(), render(layers, background, atlas))
    assert torch.equal(label_map(layers.cuda(), labels.cuda(), there).cpu(), label_map(layers, labels, atlas))


def test_wrong_shapes_are_refused(atlas: Atlas) -> None:
    layers, background = scenes(2, 3)
    with pytest.raises(InputError, match=r"give \[B, K, 3\]"):
        render(layers[0], background, atlas)
    with pytest.raises(InputError, match=r"give \[2, 8\]"):
        render(layers, background[:1], atlas)
    with pytest.raises(InputError, match="one per layer"):
        label_map(layers, torch.zeros(2, 2), atlas)


def test_one_picture_is_fixed_for_good(atlas: Atlas) -> None:
    layers = [[(97 * i * i + 31 * i) % len(atlas.keys.widths), 53 * i % 300 - 20, 89 * i % 310 - 30] for i in range(40)]
    background = [BACKGROUNDS.index("noise"), 90, 120, 150, 140, 110, 170, 45 + 256 * 77]
    picture = render(torch.tensor([layers]), torch.tensor([background]), atlas)
    assert hashlib.sha256(picture.numpy().tobytes()).hexdigest() == DIGEST
