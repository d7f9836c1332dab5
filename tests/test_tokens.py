"""Which image belongs to which row, and what the map says of every position."""

from __future__ import annotations

import pytest
import torch

from mmefficient.errors import InputError
from mmefficient.packing import Units
from mmefficient.tokens import Layout, Role, TokenMap, build, images_of_rows


def test_images_are_dealt_out_by_their_token_counts() -> None:
    assert images_of_rows([5, 0, 7], [5, 3, 4], "image") == [[0], [], [1, 2]]
    assert images_of_rows([5, 5, 0, 0], [5], "image", repeats=2) == [[0], [0], [], []]
    assert images_of_rows([0], [], "image") == [[]]


@pytest.mark.parametrize(
    ("placeholders", "lengths", "says"),
    [
        ([5, 5], [5], "row 1 has 5 image placeholder tokens but the images given for it make 0"),
        ([5, 4], [5, 5], "row 1 has 4 .* make 5"),
        ([5], [5, 5], "1 image.* left over after row 0"),
        ([0, 0], [3], "left over"),
        ([5, 9], [9, 5], "in the order of the prompts"),
    ],
)
def test_misfits_name_the_row(placeholders: list[int], lengths: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        images_of_rows(placeholders, lengths, "image")


def example() -> TokenMap:
    """Row 0: pad, text, a 2 x 2 image, text. Row 1: a 1 x 2 image, text, a video of two 1 x 1 frames, text."""
    image = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0]]).bool()
    video = torch.tensor([[0] * 7, [0, 0, 0, 1, 1, 0, 0]]).bool()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    position = torch.arange(7).expand(1, 2, -1)
    layouts = {"image": [Layout.grid(2, 2), Layout.grid(1, 2)], "video": [Layout.grid(1, 1, frames=2)]}
    return build({"image": image, "video": video}, layouts, mask, position, 3, {"image": [0, 4], "video": [0]}, {})


def test_map() -> None:
    tokens = example()
    pad, system, image, question = Role.PAD, Role.SYSTEM, Role.IMAGE, Role.QUESTION
    assert tokens.role.tolist() == [
        [pad, system, image, image, image, image, question],
        [image, image, question, image, image, question, question],
    ]
    assert tokens.image.tolist() == [[-1, -1, 0, 0, 0, 0, -1], [0, 0, -1, 1, 1, -1, -1]]
    assert tokens.row.tolist() == [[-1, -1, 0, 0, 1, 1, -1], [0, 0, -1, 0, 0, -1, -1]]
    assert tokens.col.tolist() == [[-1, -1, 0, 1, 0, 1, -1], [0, 1, -1, 0, 0, -1, -1]]
    assert tokens.tile.tolist() == [[-1, -1, 0, 0, 0, 0, -1], [0, 0, -1, 0, 1, -1, -1]]
    assert tokens.source.tolist() == [[-1, -1, 0, 1, 2, 3, -1], [4, 5, -1, 0, 1, -1, -1]]
    assert tokens.alive(2).tolist() == [[False] + [True] * 6, [True] * 7]
    assert not tokens.alive(3).any()
    assert tokens.size.eq(1).all()


def test_kinds_without_layouts_are_counted() -> None:
    where = {"image": torch.tensor([[False, True, True]])}
    tokens = build(where, {}, None, torch.arange(3)[None, None], 2, {}, {})
    assert tokens.visual.tolist() == [[False, True, True]]
    assert tokens.role[0, 0] == Role.SYSTEM


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("prompt", [(0, 0, 4, ((2, 2),)), (1, 0, 4, ((1, 2), (1, 1), (1, 1)))]),
        ("image", [(0, 0, 4, ((2, 2),)), (1, 0, 2, ((1, 2),)), (1, 1, 2, ((1, 1), (1, 1)))]),
        ("tile", [(0, 0, 4, ((2, 2),)), (1, 0, 2, ((1, 2),)), (1, 1, 1, ((1, 1),)), (1, 2, 1, ((1, 1),))]),
    ],
)
def test_units(scope: str, expected: list[tuple[int, int, int, tuple[tuple[int, int], ...]]]) -> None:
    units = Units.of(example(), scope, torch.device("cpu"))  # type: ignore[arg-type]
    assert [(unit.row, unit.ordinal, unit.count, unit.grids) for unit in units.units] == expected
    columns = torch.arange(7).expand(2, -1)
    assert units.members(columns, None).sum(1).tolist() == [unit.count for unit in units.units]
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 2] = False
    assert units.members(columns, valid).sum(1).tolist()[0] == expected[0][2] - 1
    fewer = units.with_counts([1] + [unit.count for unit in units.units[1:]])
    assert fewer.units[0].count == 1
    assert fewer.units[0].grids == ()
    assert fewer.units[1:] == units.units[1:]
