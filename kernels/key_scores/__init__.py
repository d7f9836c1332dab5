"""Attention mass each key receives from chosen query rows, without an N-by-N map."""

from __future__ import annotations

from typing import Literal

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.key_scores import reference

__all__ = ["key_scores"]


def key_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    rows: Literal["mean", "sum"] = "mean",
    heads: Literal["each", "mean", "sum"] = "each",
    impl: Impl = "auto",
) -> torch.Tensor:
    """Attention probability each key receives from the given query rows.

    Memory grows with rows + keys. Accumulates in float32 whatever the inputs are; only the reference has a backward.

    Args:
        query: the chosen query rows, [B, Hq, R, D], rotary positions already applied.
        key: all keys those rows may see, [B, Hkv, K, D]; Hq is a multiple of Hkv (grouped-query attention).
        scale: factor on the logits, usually D ** -0.5.
        mask: bool (True = visible) or additive float, broadcastable to [B, Hq, R, K]; None = every key is visible.
        last: integer [B, R], the last key each row sees (causal attention without a mask); -1 = none.
        lse: float32 [B, Hq, R], natural log-sum-exp of each row's logits if some attention already computed it; it
            must have seen the same keys, or more of them (then the result is the mass on the keys given).
        rows, heads: how rows and heads are combined; heads="each" keeps them apart.
        impl: "auto", "triton" or "reference".

    Returns:
        float32 [B, Hq, K], or [B, K]. A row that sees no key adds nothing.

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.
    """
    if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}.")
    if uses_triton(impl, query, key, mask, lse):
        from mmefficient.kernels.key_scores import kernel, op

        run = op.key_scores_op if torch.compiler.is_compiling() else kernel.key_scores
        with launching_on(query):
            found = run(query, key, scale, mask, last, lse)
    else:
        found = reference.key_scores(query, key, scale, mask, last, lse)
    if rows == "mean" and query.shape[2] > 1:
        found = found / query.shape[2]
    return found if heads == "each" else found.mean(1) if heads == "mean" else found.sum(1)
