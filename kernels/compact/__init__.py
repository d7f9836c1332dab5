"""Gather the rows that stay, ragged over the batch, in one launch."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.compact import reference

__all__ = ["compact", "compact_rows"]


def compact(
    k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, *, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that stay.

    Args:
        k, v: [B, Hkv, N, D], any strides and dtypes.
        keep: integer [B, n], or [B, Hkv, n] for a list per head: which rows stay, in this order; -1 = a row of zeros,
            so rows of the batch that keep fewer are padded on either side. Indices are not checked on the device.

    Returns:
        two contiguous tensors [B, Hkv, n, D].

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.
    """
    index = keep[:, None] if keep.ndim == 2 else keep
    if k.ndim != 4 or v.ndim != 4 or index.ndim != 3 or index.shape[1] not in (1, k.shape[1]):
        raise ValueError(f"keep {tuple(keep.shape)} does not fit k {tuple(k.shape)} and v {tuple(v.shape)}.")
    return _two(k, v, index, impl)


def compact_rows(
    x: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, *, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden rows that stay, and their position ids.

    Args:
        x: [B, N, C].
        positions: [B, N], or [P, B, N] for rotary positions of P axes.
        keep: integer [B, n]; -1 = a row of zeros.

    Returns:
        [B, n, C] and [B, n] or [P, B, n].

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.
    """
    if x.ndim != 3 or keep.ndim != 2 or positions.shape[-2:] != x.shape[:2]:
        raise ValueError(
            f"x {tuple(x.shape)}, positions {tuple(positions.shape)}, keep {tuple(keep.shape)} do not fit each other."
        )
    axes = positions[None] if positions.ndim == 2 else positions
    rows, ids = _two(x[:, None], axes.transpose(0, 1)[..., None], keep[:, None], impl)
    ids = ids[..., 0].transpose(0, 1)
    return rows[:, 0], ids[0] if positions.ndim == 2 else ids


def _two(x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor, impl: Impl) -> tuple[torch.Tensor, torch.Tensor]:
    if uses_triton(impl, x, y):
        from mmefficient.kernels.compact import kernel, op

        run = op.compact_op if torch.compiler.is_compiling() else kernel.gather_two
        with launching_on(x):
            return run(x, y, keep)
    return reference.gather_rows(x, keep), reference.gather_rows(y, keep)
