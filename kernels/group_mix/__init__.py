"""Partial results of key groups put together under new masses, in one launch."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.group_mix import reference

__all__ = ["group_mix"]


def group_mix(
    out: torch.Tensor,
    lse: torch.Tensor,
    where: torch.Tensor,
    move: torch.Tensor,
    least: torch.Tensor,
    *,
    dtype: torch.dtype,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Each row's sum over groups of mass_g * out_g; forward only.

    m_g is the share of attention that group g has under one softmax over all keys. In a head of `where` and in rows for
    which every condition holds, sum_g least[c, g] * m_g >= least[c, groups], mass = move @ m. Elsewhere mass = m, which
    gives plain attention.

    Args:
        out: [groups, B, Hq, Nq, D], lse: float32 [groups, B, Hq, Nq]: partial results of an attention kernel.
        where: bool [B, Hq or 1]. move: float32 [groups, groups]. least: float32 [conditions, groups + 1].
        dtype: of the result.

    Returns:
        [B, Hq, Nq, D] in the memory order [B, Nq, Hq, D]; zeros for a row that sees nothing.

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.
    """
    groups, batch, heads = lse.shape[:3]
    fits = out.shape[:-1] == lse.shape and move.shape == (groups, groups) and least.shape[1:] == (groups + 1,)
    if not fits or where.shape not in ((batch, heads), (batch, 1)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (out, lse, where, move, least))
        raise ValueError(f"out, lse, where, move and least of shapes {shapes} do not fit each other.")
    if uses_triton(impl, out, lse):
        from mmefficient.kernels.group_mix import kernel, op

        run = op.mix_op if torch.compiler.is_compiling() else kernel.group_mix
        with launching_on(out):
            return run(out, lse, where, move, least, dtype)
    return reference.group_mix(out, lse, where, move, least, dtype)
