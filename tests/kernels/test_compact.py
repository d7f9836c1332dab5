from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels.compact import compact, compact_rows

LENGTHS = [21, *(pytest.param(n, marks=pytest.mark.gpu) for n in (639, 2881))]


def keep_lists(shape: tuple[int, ...], length: int, device: torch.device) -> torch.Tensor:
    """Ragged lists: some of the places are -1, on either side."""
    keep = torch.randint(0, length, shape, device=device)
    keep[0, ..., : shape[-1] // 3] = -1
    keep[-1, ..., -2:] = -1
    return keep


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", [(3, 18), (3, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compact(kernel: Any, device: torch.device, shape: tuple[int, ...], length: int, dtype: torch.dtype) -> None:
    k = torch.randn(3, length, 2, 80, device=device, dtype=dtype).transpose(1, 2)
    v = torch.randn(3, 2, length, 48, device=device, dtype=dtype)
    keep = keep_lists(shape, length, device)
    for mine, wanted in zip(kernel(compact, k, v, keep), compact(k, v, keep, impl="reference"), strict=True):
        assert torch.equal(mine, wanted)
        assert mine.is_contiguous()


@pytest.mark.parametrize("axes", [(), (3,)])
@pytest.mark.parametrize("length", LENGTHS)
def test_hidden_rows_and_positions(kernel: Any, device: torch.device, axes: tuple[int, ...], length: int) -> None:
    x = torch.randn(3, length, 1100, device=device)
    positions = torch.randint(0, 2**40, (*axes, 3, length), device=device)
    keep = keep_lists((3, 7), length, device)
    rows, ids = kernel(compact_rows, x, positions, keep)
    wanted = compact_rows(x, positions, keep, impl="reference")
    assert torch.equal(rows, wanted[0])
    assert torch.equal(ids, wanted[1])


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        compact(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.zeros(1, 3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit"):
        compact_rows(torch.randn(1, 4, 8), torch.zeros(1, 5), torch.zeros(1, 2, dtype=torch.long))
