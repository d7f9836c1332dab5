"""`decode_linear` in plain torch, rounding where stock modules round: the specification of the kernel."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmefficient.kernels.rms_norm.reference import rms_norm


def decode_linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """See the public function."""
    if norm is not None:
        x = rms_norm(x, norm, eps, None)[0]
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    out = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, -1)
    return out if residual is None else residual + out
