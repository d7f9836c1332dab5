"""`rope_store` in plain torch, rounding where stock modules round: the specification of the kernel."""

from __future__ import annotations

import torch


def rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """See the public function."""
    batch, rows = q.shape[:2]
    at = slots.long()[:, None] + torch.arange(rows, device=q.device)
    row = torch.arange(batch, device=q.device)[:, None]
    k_cache[row, :, at] = rotate(k, cos, sin)
    v_cache[row, :, at] = v
    return rotate(q, cos, sin).contiguous().transpose(1, 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, N, H, D] turned by the angles of cos and sin."""
    low, high = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-high, low], -1) * sin[:, :, None]
