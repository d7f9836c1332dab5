"""Thinning a ranked list by dropping, round after round, items that are most like another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.drop_alike import reference

__all__ = ["drop_alike"]

MOST = 16384
"""Longest list, half of which one program holds at once; longer ones go to the reference."""


def drop_alike(
    alike: torch.Tensor,
    ranked: torch.Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    counts: Sequence[int],
    *,
    step: int,
    impl: Impl = "auto",
) -> torch.Tensor:
    """`counts[u]` of the items `ranked[u, starts[u] : ends[u]]` of every unit u, without waiting for the device.

    A round splits the list into even and odd places, finds for each even item the odd one it is most like, and drops
    the `step` even ones with the largest likeness (fewer in the last round). The even ones that stay, most alike first,
    precede the odd ones in the next round. Ties go to the earlier place.

    Args:
        alike: float32 [U, N, N]; ranked: int64 [U, N], items, best first.
        impl: "auto", "triton" or "reference".

    Returns:
        int64 [U, max(counts)], in the order of the last round; arbitrary items behind the first `counts[u]`.

    Raises:
        ValueError: shapes that do not fit, or more to be kept than there is.
        RuntimeError: impl="triton" where it cannot run.
    """
    units, items = ranked.shape
    if alike.shape != (units, items, items) or not len(starts) == len(ends) == len(counts) == units:
        raise ValueError(f"alike {tuple(alike.shape)} or the bounds do not fit ranked {tuple(ranked.shape)}.")
    if any(not 0 <= start <= end <= items or count > end - start
           for start, end, count in zip(starts, ends, counts, strict=True)):  # fmt: skip
        raise ValueError("a unit has fewer items than are to be kept.")
    if uses_triton(impl, alike) and max(end - start for start, end in zip(starts, ends, strict=True)) <= MOST:
        from mmefficient.kernels.drop_alike import kernel

        with launching_on(alike):
            return kernel.drop_alike(alike, ranked, starts, ends, counts, step)
    return reference.drop_alike(alike, ranked, starts, ends, counts, step)
