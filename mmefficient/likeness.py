"""How alike visual tokens are, for methods that choose among all pairs of them."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def cosines(features: torch.Tensor) -> torch.Tensor:
    """float32 [U, N, N]: cosine of all pairs of `features` [U, N, D]; a zero vector is like nothing.

    On CUDA, features in half precision are multiplied as they are: products of two such numbers are exact in float32,
    in which they are added up, and tensor cores do it some ten times as fast as the same in float32.
    """
    if features.is_cuda and features.dtype in (torch.bfloat16, torch.float16):
        inverse = 1 / features.float().norm(dim=-1).clamp(min=1e-12)
        products = torch.bmm(features, features.mT, out_dtype=torch.float32)
        return products.mul_(inverse[:, :, None] * inverse[:, None])  # symmetric to the last bit, if the products are
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit.mT
