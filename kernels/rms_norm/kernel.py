"""`rms_norm` in Triton: a program holds one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import power_above
from mmefficient.kernels.launch import begin, launch, release


@triton.jit
def _norm(
    x, residual, weight, out, total, x_m, r_m, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    value = tl.load(x + row * x_m + c, mask=inside, other=0.0)
    if RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + row * r_m + c, mask=inside, other=0.0).to(tl.float32)).to(
            out.dtype.element_ty
        )
        tl.store(total + row * C + c, value, mask=inside)
    release(OVERLAP)
    wide = value.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / C + eps)
    wide *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, wide.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function; the second result is empty without a residual."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    other = flat if residual is None else residual.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    block = power_above(width)
    launch(
        _norm, (flat.shape[0], 1, 1), (flat, other, weight, out, total),
        (flat.stride(0), other.stride(0), float(eps)), (width, block, residual is not None),
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out, total
