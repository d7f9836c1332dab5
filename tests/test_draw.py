"""What is drawn is what the report says, patch by patch."""

from __future__ import annotations

import colorsys
import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmefficient.cli import app
from mmefficient.draw import GAP, LINE, MARGIN, SIDE, kept_at, kept_tokens
from mmefficient.errors import InputError
from mmefficient.plan import Plan
from mmefficient.report import Report, RowReport
from tests import tiny


def report(lives: list[int], places: list[tuple[int, int, int, int]], layers: int = 4) -> Report:
    until = torch.tensor(lives, dtype=torch.int32)
    kept = [int((until > layer).sum()) for layer in range(layers)]
    return Report(
        "p", "apply", [RowReport(len(lives), kept)], 1, 1, lives_until=(until,), places=(torch.tensor(places),)
    )


GRID = [(0, 0, row, col) for row in range(2) for col in range(3)]


def test_panels_show_what_each_layer_holds() -> None:
    picture = Image.new("RGB", (300, 200), (200, 100, 50))
    drawn = kept_tokens(picture, [(report([4, 2, 4, 2, 2, 4], GRID), "yes")])
    top, cell = MARGIN + 2 * LINE, SIDE / 3
    for panel, gone in ((0, ()), (1, (1, 3, 4))):
        left = MARGIN + panel * (SIDE + MARGIN)
        for index, (_, _, row, col) in enumerate(GRID):
            pixel = drawn.getpixel((int(left + (col + 0.5) * cell), int(top + (row + 0.5) * cell)))
            assert pixel == ((44, 22, 11) if index in gone else (200, 100, 50))
    assert drawn.width == 2 * (SIDE + MARGIN) + MARGIN


def test_the_centre_of_a_wide_picture_is_what_the_tower_saw() -> None:
    picture = Image.new("RGB", (600, 200), "red")
    picture.paste((0, 0, 255), (200, 0, 400, 200))
    square = [(0, 0, row, col) for row in range(2) for col in range(2)]
    drawn = kept_tokens(picture, [(report([4] * 4, square), "")])
    panel = drawn.crop((MARGIN + 2, MARGIN + 2 * LINE + 2, MARGIN + SIDE - 2, MARGIN + 2 * LINE + SIDE - 2))
    assert panel.getcolors() == [(panel.width * panel.height, (0, 0, 255))]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("size", [(40, 20), (24, 30), (16, 16)])
def test_every_token_of_every_family_is_where_the_processor_put_it(family: str, size: tuple[int, int]) -> None:
    """Tiles beside their overview, 2 x 2 merges, unpadded grids: each cell is lit in the layers that hold it."""
    model = tiny.build(family)
    visual, pixels = tiny.visual_ids(family, size)
    batch = tiny.collate(family, [([2, 3, *visual, 4, 5], [pixels])])
    with Plan("random(keep=0.7)+fastv(layer=2,keep=0.4)").apply(model) as run, torch.no_grad():
        model(**batch)
    found, picture = run.report(), Image.new("RGB", (size[1] * 10, size[0] * 10), (200, 100, 50))
    place, views = found.places[0], found.places[0][:, 1].unique().tolist()
    assert len(views) == (2 if family in ("llava_next", "llava_onevision") else 1)
    for layer in range(tiny.LAYERS):
        panel, kept = kept_at(picture, found, layer), set(found.kept(0, layer).tolist())
        width = (panel.width - GAP * (len(views) - 1)) / len(views)
        for index, (_, view, row, col) in enumerate(place.tolist()):
            rows, cols = (place[place[:, 1] == view][:, 2:].amax(0) + 1).tolist()
            x = views.index(view) * (width + GAP) + (col + 0.5) * width / cols
            pixel = panel.getpixel((int(x), int((row + 0.5) * panel.height / rows)))
            assert pixel == ((200, 100, 50) if index in kept else (44, 22, 11))


def test_several_images_and_videos_are_refused() -> None:
    for others in ([(1, 0, 0, 0)], [(0, 1, 0, 0), (0, 2, 0, 0)]):
        places = [(0, 0, 0, 0), *others]
        with pytest.raises(InputError, match="row 0"):
            kept_tokens(Image.new("RGB", (9, 9)), [(report([4] * len(places), places), "")])
    nothing = Report(
        "p", "apply", [RowReport(0, [0])], 1, 1, lives_until=(torch.empty(0),), places=(torch.empty(0, 4),)
    )
    with pytest.raises(InputError, match="row 0"):
        kept_tokens(Image.new("RGB", (9, 9)), [(nothing, "")])


def test_the_command_draws_the_embedded_models_choice(tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    options = ["--plan", "fastv(layer=2,keep=0.25)", "--plan", "exit(layer=6)", "--out", str(out), "--device", "cpu"]
    done = CliRunner().invoke(app, ["show", "sample", "Is there a frog?", *options], catch_exceptions=False)
    assert done.exit_code == 0
    with Image.open(out) as drawn:
        assert drawn.height == 2 * (SIDE + 2 * LINE + 2 * MARGIN)


def test_an_unwritable_path_is_one_sentence(tmp_path: Path) -> None:
    options = ["--plan", "exit(layer=6)", "--out", str(tmp_path / "no" / "kept.png"), "--device", "cpu"]
    done = CliRunner().invoke(app, ["show", "sample", "Is there a frog?", *options])
    assert isinstance(done.exception, InputError)


def test_merged_tokens_share_a_colour_with_the_one_that_carries_them_on() -> None:
    picture = Image.new("RGB", (300, 200), (100, 100, 100))
    merged = dataclasses.replace(report([4, 0, 4, 0, 4, 0], GRID), merged_into=(torch.tensor([0, 0, 2, 3, 2, 5]),))
    drawn = kept_at(picture, merged, 0)
    cell = SIDE / 3
    at = [drawn.getpixel((int((col + 0.5) * cell), int((row + 0.5) * cell))) for _, _, row, col in GRID]
    hue = [colorsys.rgb_to_hsv(*(part / 255 for part in colour))[0] for colour in at]
    assert hue[0] == pytest.approx(hue[1], abs=0.02)  # 1 went into 0
    assert hue[2] == pytest.approx(hue[4], abs=0.02)  # 4 stays, and stands for what went into 2 as well
    assert abs(hue[0] - hue[2]) > 0.1
    assert sum(at[1]) < sum(at[0])
    assert at[3] == at[5] == (22, 22, 22)  # left without being merged
