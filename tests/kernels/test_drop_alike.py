from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels.drop_alike import drop_alike

SIZES = [(45, 9), *(pytest.param(*size, marks=pytest.mark.gpu) for size in ((576, 64), (1500, 100), (2880, 320)))]


@pytest.mark.parametrize("levels", [4, 0])
@pytest.mark.parametrize(("items", "count"), SIZES)
def test_equals_the_reference(kernel: Any, device: torch.device, items: int, count: int, levels: int) -> None:
    """Ragged units, one that keeps all and one that keeps nothing; `levels`: few different likenesses, many ties."""
    alike = torch.randn(4, items, items, device=device)
    alike = (alike * levels).round() if levels else alike
    ranked = torch.rand(4, items, device=device).argsort(1)
    starts, ends, counts = [0, 5, 3, 7], [items, items - 2, 3 + count, items], [count, count - 1, count, 0]
    found = kernel(drop_alike, alike, ranked, starts, ends, counts, step=8)
    wanted = drop_alike(alike, ranked, starts, ends, counts, step=8, impl="reference")
    for mine, yours, kept in zip(found, wanted, counts, strict=True):
        assert torch.equal(mine[:kept], yours[:kept])


def test_lists_of_thousands(kernel: Any, device: torch.device) -> None:
    """Four rounds on more items than a block holds twice; longer lists than the kernel takes go to the reference."""
    alike, ranked = torch.randn(1, 2880, 2880, device=device), torch.randperm(2880, device=device)[None]
    found = kernel(drop_alike, alike, ranked, [160], [2880], [2690], step=8)
    assert torch.equal(found, drop_alike(alike, ranked, [160], [2880], [2690], step=8, impl="reference"))


def test_one_and_two_items(kernel: Any, device: torch.device) -> None:
    alike, ranked = torch.ones(1, 3, 3, device=device), torch.tensor([[2, 0, 1]], device=device)
    assert kernel(drop_alike, alike, ranked, [0], [3], [1], step=8).tolist() == [[0]]
    assert kernel(drop_alike, alike, ranked, [2], [3], [1], step=8).tolist() == [[1]]
    assert drop_alike(alike, ranked, [0], [3], [1], step=8, impl="reference").tolist() == [[0]]


def test_refuses_what_does_not_fit() -> None:
    alike, ranked = torch.zeros(1, 4, 4), torch.arange(4)[None]
    with pytest.raises(ValueError, match="do not fit"):
        drop_alike(alike[:, :3], ranked, [0], [4], [2], step=8)
    with pytest.raises(ValueError, match="fewer items"):
        drop_alike(alike, ranked, [1], [4], [4], step=8)
