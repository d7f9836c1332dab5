"""Linear layers for the few rows of a decoding step, with what stands before and behind them, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.decode_linear import reference

__all__ = ["decode_linear"]

MAX_WEIGHTS = 3
MAX_ROWS = 16


def decode_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Product of up to 16 rows with one to three weights, each read once from where it lies; forward only.

    y = cat(norm(x) @ w.T + b for each weight), then silu(gate) * up if `gated`, then + residual. Everything is float32
    in between and rounded once; with several rows, a norm takes a launch of its own, and rounds.

    Args:
        x: [..., K], up to 16 rows; float16, bfloat16 or float32.
        weights: one to three [N_i, K], as `torch.nn.Linear` holds them, rows contiguous; those of queries, keys and
            values need not be stacked.
        biases: one [N_i] or None for each weight; None = none.
        norm: weight [K] of an RMSNorm that x goes through first; None = no norm. eps: added to its mean square.
        gated: `weights` are the gate and the up projection of a gated SiLU.
        residual: [..., N], added last.
        impl: "auto", "triton" or "reference"; only the reference has a backward.

    Returns:
        [..., N] in the dtype of x; N is the sum of the N_i, or N_0 if gated.

    Raises:
        ValueError: shapes that do not fit each other, too many rows or weights.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.

    Source: RMSNorm, arXiv:1910.07467 eq. 4; SwiGLU, arXiv:2002.05202 eq. 5.
    """
    width = x.shape[-1]
    given: list[torch.Tensor | None] = [None] * len(weights) if biases is None else list(biases)
    if not 1 <= len(weights) <= MAX_WEIGHTS or any(w.ndim != 2 or w.shape[1] != width for w in weights):
        raise ValueError(f"weights {[tuple(w.shape) for w in weights]} do not fit x {tuple(x.shape)}; one to three do.")
    if not width <= x.numel() <= MAX_ROWS * width:
        raise ValueError(f"x {tuple(x.shape)} is not 1 to {MAX_ROWS} rows; use torch.nn.functional.linear for more.")
    if gated and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise ValueError("gated takes two weights of one shape: the gate and the up projection.")
    lengths = [w.shape[0] if b is None else len(b) for w, b in zip(weights, given, strict=False)]
    if lengths != [w.shape[0] for w in weights] or len(given) != len(weights):
        raise ValueError("biases are one vector, or None, for each weight.")
    size = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
    if residual is not None and residual.shape != (*x.shape[:-1], size):
        raise ValueError(f"residual {tuple(residual.shape)} is not {(*x.shape[:-1], size)}, the shape of the result.")
    if norm is not None and norm.shape != (width,):
        raise ValueError(f"norm {tuple(norm.shape)} does not fit x {tuple(x.shape)}.")
    arguments = (x, list(weights), given, norm, eps, gated, residual)
    if uses_triton(impl, x, *weights, *given, norm, residual):
        from mmefficient.kernels.decode_linear import kernel, op

        run = op.linear_op if torch.compiler.is_compiling() else kernel.decode_linear
        with launching_on(x):
            return run(*arguments)
    return reference.decode_linear(*arguments)
