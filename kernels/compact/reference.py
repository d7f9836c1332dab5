"""`compact` in plain torch: the specification every faster version is tested against."""

from __future__ import annotations

import torch


def gather_rows(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, H, N, C] named by keep [B, H or 1, n]; zeros where keep is -1."""
    at = keep.long().expand(-1, x.shape[1], -1)[..., None]
    return x.gather(2, at.clamp(min=0).expand(-1, -1, -1, x.shape[3])).masked_fill(at < 0, 0)
