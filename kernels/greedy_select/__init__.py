"""Greedy choice of a few items among many: farthest from each other, covering the rest, or spanning the most volume."""

from __future__ import annotations

from typing import Literal

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.greedy_select import reference

__all__ = ["Objective", "greedy_select"]

Objective = Literal["max_min", "coverage", "volume"]


def greedy_select(
    pairs: torch.Tensor,
    valid: torch.Tensor,
    steps: int,
    *,
    objective: Objective,
    weight: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """The first `steps` greedy picks of every unit, all units at once, without waiting for the device.

    - "max_min": `pairs` are distances. First the item whose nearest other is farthest, then always the one farthest
      from all picked.
    - "coverage": `pairs` are likenesses. Always the j with the largest weight_j * sum_i max(0, pairs_ij - c_i), where
      c_i is the largest of 0 and the likenesses of i to what is picked.
    - "volume": `pairs` are a positive semi-definite kernel. Always the item that multiplies the determinant of the
      picked block the most (greedy MAP of a determinantal point process, by a running Cholesky factor).

    Ties go to the earlier item. A unit with fewer than `steps` items gives arbitrary picks once it has none left. With
    "volume", what remains below 1e-6 of the largest diagonal entry counts as nothing: such items go in order.

    Args:
        pairs: float32 [U, N, N], symmetric; where an item is not valid it may hold anything finite.
        valid: bool [U, N].
        weight: float32 [U, N], >= 0; for "coverage", None = 1 everywhere.
        impl: "auto", "triton" or "reference".

    Returns:
        int64 [U, steps].

    Raises:
        ValueError: shapes that do not fit each other, or an unknown objective.
        RuntimeError: impl="triton" where it cannot run.
    """
    if objective not in reference.RULES:
        raise ValueError(f"objective={objective!r} is none of {', '.join(reference.RULES)}.")
    units, items = valid.shape
    if pairs.shape != (units, items, items) or (weight is not None and weight.shape != valid.shape):
        raise ValueError(f"pairs {tuple(pairs.shape)} or weight do not fit valid {tuple(valid.shape)}.")
    first = reference.first_scores(pairs, valid, objective, weight)
    if uses_triton(impl, pairs, weight):
        from mmefficient.kernels.greedy_select import kernel, op

        run = op.greedy_select_op if torch.compiler.is_compiling() else kernel.greedy_select
        with launching_on(pairs):
            return run(pairs, valid, first, steps, objective)
    return reference.greedy_select(pairs, valid, first, steps, objective)
