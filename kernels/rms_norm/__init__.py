"""RMSNorm of a sum, and the sum, in one launch."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.rms_norm import reference

__all__ = ["rms_norm"]

MAX_WIDTH = 32768


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x, or of x + residual, over the last axis; forward only.

    Args:
        x, residual: [..., C], C <= 32768; float16, bfloat16 or float32; any strides with the last one 1.
        weight: [C]. eps: added to the mean square, which is taken in float32.

    Returns:
        the normalised tensor and the sum x + residual, rounded to the dtype of x before the norm as stock modules do;
        without a residual x itself.

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.

    Source: arXiv:1910.07467, eq. 4.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape) or len(weight) > MAX_WIDTH:
        other = "" if residual is None else f", residual {tuple(residual.shape)}"
        raise ValueError(
            f"x {tuple(x.shape)}{other} and weight {tuple(weight.shape)} do not fit; C is at most {MAX_WIDTH}."
        )
    if uses_triton(impl, x, weight, residual):
        from mmefficient.kernels.rms_norm import kernel, op

        run = op.norm_op if torch.compiler.is_compiling() else kernel.rms_norm
        with launching_on(x):
            out, total = run(x, weight, eps, residual)
    else:
        out, total = reference.rms_norm(x, weight, eps, residual)
    return out, x if residual is None else total
