"""How accurate a low-precision result has to be: as good as the same computation done eagerly in that dtype."""

from __future__ import annotations

import torch

ROUNDINGS = 16 * torch.finfo(torch.float32).eps
"""Sums run in float32 in another order than the eager ones; no result can be held to less."""


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`, in float64; infinite differences and NaN count as infinite."""
    difference = (found.double() - exact).norm() / exact.norm().clamp(min=1e-300)
    return difference.item() if difference.isfinite() else float("inf")


def require(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str = "output") -> float:
    """Check that `found` is no further from `exact` (float64) than `eager` is, or than a few roundings in float32.

    Returns:
        the error of `found`, see `error`.

    Raises:
        AssertionError: it is further away, or holds NaN; names `what`.
    """
    mine, bound = error(found, exact), max(error(eager, exact), ROUNDINGS)
    if not mine <= bound:
        raise AssertionError(f"{what}: relative error {mine:.2e} exceeds that of the eager computation, {bound:.2e}.")
    return mine
