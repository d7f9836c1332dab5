"""`swiglu` in plain torch, rounding where stock modules round: the specification of the kernel."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See the public function."""
    return F.silu(gate) * up
