"""Rotary positions for new queries and keys, and the new keys and values into their cache, in one launch."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.rope_store import reference

__all__ = ["rope_store"]


def rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Rotate q and k, write k and v into `k_cache` and `v_cache` in place, return the rotated q; forward only.

    Slots stay on the device, so that a captured CUDA graph follows them.

    Args:
        q, k, v: [B, N, Hq, D] and twice [B, N, Hkv, D], any strides with the last one 1: views of one product will do.
        cos, sin: [B or 1, N, D], both halves of D filled, as transformers' rotary embeddings give them; sections of
            several axes (M-RoPE) already merged.
        k_cache, v_cache: buffers [B, Hkv, room, D] of the dtype of k; any strides with the last one 1.
        slots: integer [B]: row b writes its N tokens to slots[b] .. slots[b] + N - 1, all within the room, which is not
            checked on the device.
        impl: "auto", "triton" or "reference".

    Returns:
        [B, Hq, N, D] in the memory order [B, N, Hq, D], which attention passes on to its output.

    Raises:
        ValueError: shapes that do not fit each other.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.

    Source: RoFormer, arXiv:2104.09864, eq. 34, with the halves of D as the two axes of a rotation.
    """
    batch, rows, _, dim = q.shape
    cached = (batch, k.shape[2], k_cache.shape[2], dim)
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != dim or dim % 2:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other.")
    if k_cache.shape != cached or v_cache.shape != cached or rows > cached[2]:
        raise ValueError(f"caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not hold k {tuple(k.shape)}.")
    if cos.shape != sin.shape or cos.shape[1:] != (rows, dim) or cos.shape[0] not in (1, batch):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}.")
    arguments = (q, k, v, cos, sin, k_cache, v_cache, slots)
    if uses_triton(impl, q, k, v, k_cache, v_cache):
        from mmefficient.kernels.rope_store import kernel, op

        run = op.rope_op if torch.compiler.is_compiling() else kernel.rope_store
        with launching_on(q):
            return run(*arguments)
    return reference.rope_store(*arguments)
