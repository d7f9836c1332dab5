"""`key_scores` in plain torch: the specification every faster version is tested against."""

from __future__ import annotations

import torch

ROWS_AT_ONCE = 32  # bounds the memory when many rows are averaged: B * heads * ROWS_AT_ONCE * keys floats


def key_scores(
    query: torch.Tensor, key: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention probability each key receives, averaged over the given query rows.

    No matrix of all rows by all keys is ever held.

    Args:
        query: the chosen query rows, [B, Hq, R, D], rotary positions already applied.
        key: all keys those rows may see, [B, Hkv, K, D]; Hq is a multiple of Hkv (grouped-query attention).
        scale: factor on the logits, usually D ** -0.5.
        mask: bool (True = visible) or additive float, broadcastable to [B, Hq, R, K]; None = every key is visible.

    Returns:
        float32 [B, Hq, K]. The softmax runs in float32 whatever the inputs are. A row that sees no key adds nothing.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    total = torch.zeros(batch, heads, keys, dtype=torch.float32, device=query.device)
    for start in range(0, rows, ROWS_AT_ONCE):
        chunk = grouped[:, :, :, start : start + ROWS_AT_ONCE]
        logits = torch.matmul(chunk, key[:, :, None].transpose(-1, -2)).float().mul_(scale)
        logits = logits.reshape(batch, heads, -1, keys)
        if mask is not None:
            seen = mask if mask.shape[-2] == 1 else mask[..., start : start + ROWS_AT_ONCE, :]
            logits = logits.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen.float()
        total += logits.softmax(-1).nan_to_num_(0.0).sum(2)
    return total / rows
