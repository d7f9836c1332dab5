"""`swiglu` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import ceil_div, power_above
from mmefficient.kernels.launch import begin, launch, release


@triton.jit
def _swiglu(gate, up, out, gate_m, up_m, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_m + c, mask=c < width, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_m + c, mask=c < width, other=0.0).to(tl.float32)
    release(OVERLAP)
    tl.store(out + row * width + c, (g * u / (1.0 + tl.exp(-g))).to(out.dtype.element_ty), mask=c < width)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See the public function."""
    width = gate.shape[-1]
    g, u = gate.reshape(-1, width), up.reshape(-1, width)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = min(1024, power_above(width))
    grid = (g.shape[0], ceil_div(width, block), 1)
    launch(_swiglu, grid, (g, u, out), (g.stride(0), u.stride(0), width), (block,))
    return out
