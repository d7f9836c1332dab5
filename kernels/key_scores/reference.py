"""`key_scores` in plain torch: the specification every faster version is tested against."""

from __future__ import annotations

import torch

ROWS_AT_ONCE = 32  # bounds the memory when many rows are averaged: B * heads * ROWS_AT_ONCE * keys floats


def key_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    last: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """See the public function; float32 [B, Hq, K], summed over rows."""
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    total = torch.zeros(batch, heads, keys, dtype=torch.float32, device=query.device)
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = start + ROWS_AT_ONCE
        chunk = grouped[:, :, :, start:stop]
        logits = torch.matmul(chunk, key[:, :, None].transpose(-1, -2)).float().mul_(scale)
        logits = logits.reshape(batch, heads, -1, keys)
        if last is not None:
            behind = torch.arange(keys, device=key.device) > last[:, None, start:stop, None]
            logits = logits.masked_fill(behind, float("-inf"))
        if mask is not None:
            seen = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
            logits = logits.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen.float()
        if lse is None:
            total += logits.softmax(-1).nan_to_num_(0.0).sum(2)
        else:
            total += (logits - lse[:, :, start:stop, None]).exp_().nan_to_num_(0.0).sum(2)
    return total
