"""silu(gate) * up in one launch."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """silu(gate) * up, in float32 and rounded once; forward only.

    Args:
        gate, up: [..., C]; float16, bfloat16 or float32; any strides with the last one 1, so that both may be halves of
            the result of one product.

    Returns:
        contiguous [..., C].

    Raises:
        ValueError: shapes that differ.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.

    Source: arXiv:2002.05202, eq. 5.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ.")
    if uses_triton(impl, gate, up):
        from mmefficient.kernels.swiglu import kernel, op

        run = op.swiglu_op if torch.compiler.is_compiling() else kernel.swiglu
        with launching_on(gate):
            return run(gate, up)
    return reference.swiglu(gate, up)
