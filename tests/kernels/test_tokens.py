from __future__ import annotations

import torch

from mmefficient.kernels.grouped_attention import Pattern, grouped_attention, pages_apart, window
from mmefficient.kernels.grouped_attention.tokens import layout_of
from mmefficient.tokens import Layout, build


def pairs(pattern: Pattern) -> torch.Tensor:
    """bool [15, 15]: two words, a 2 x 3 image, another, one more word."""
    image = torch.zeros(1, 15, dtype=torch.bool)
    image[:, 2:14] = True
    grids = {"image": [Layout.grid(2, 3), Layout.grid(2, 3)]}
    position = torch.arange(15)[None, None]
    tokens = build({"image": image, "video": image & False}, grids, None, position, 2, {"image": [0, 6]}, {})
    layout = layout_of(tokens, pattern)
    q = torch.randn(1, 1, 15, 8)
    assert grouped_attention(q, q, q, layout, partials=True)[0].shape == (2, 1, 1, 15, 8)
    return layout.visible()[0, 0]


def test_images_are_pages() -> None:
    found = pairs(pages_apart())
    wanted = torch.ones(15, 15, dtype=torch.bool).tril()
    wanted[8:14, 2:8] = False
    assert torch.equal(found, wanted)


def test_windows_stay_inside_an_image() -> None:
    found = pairs(window(1))
    assert found[13].nonzero()[:, 0].tolist() == [0, 1, 9, 10, 12, 13]  # its grid: 8 9 10 / 11 12 13
    assert found[14].all()
