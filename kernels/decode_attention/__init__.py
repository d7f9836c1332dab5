"""Attention of a few new tokens over a stored cache: split-K, capturable in a CUDA graph."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, uses_triton
from mmefficient.kernels.decode_attention import reference

__all__ = ["decode_attention"]

MAX_NEW = 8
MAX_GROUPS = 4


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    groups: int = 4,
    bias: torch.Tensor | None = None,
    logit_map: torch.Tensor | None = None,
    head_gain: torch.Tensor | None = None,
    scale: float | None = None,
    partials: bool = False,
    lse: bool = False,
    impl: Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of 1 to 8 new rows per row of the batch over stored keys and values, forward only.

    The new rows are the last of the stored ones: new row i of row b sees the keys starts[b] to lengths[b] - Nq + i.
    Lengths stay on the device, so that a captured CUDA graph follows them. Logits are formed as in `grouped_attention`.

    Args:
        q: [B, Hq, Nq, D], Nq <= 8; float16, bfloat16 or float32; any strides with the last one 1, like k and v.
        k, v: buffers [B, Hkv, room, D] with Hkv dividing Hq; what stands behind `lengths` is not used.
        lengths: integer [B], stored keys of each row, the new ones included.
        starts: integer [B], the first key that is real (left padding); None = 0.
        group: integer [B, room], the key groups, 0..groups-1; needed by `logit_map` and `partials`.
        groups: number of key groups, 1 to 4; counts with `partials` alone.
        bias: added to the logits, broadcastable to [B, Hq, room].
        logit_map: (a, b, c) per head and key group, [3, B or 1, Hq, groups].
        head_gain: factor on the output, broadcastable to [B, Hq, Nq].
        scale: None = D ** -0.5.
        partials: return every key group's own softmax instead of one over all keys; see `grouped_attention`.
        lse: also return the log-sum-exp.
        impl: "auto", "triton" or "reference"; only the reference has a backward.

    Returns:
        out [B, Hq, Nq, D] in the dtype and memory order of q; with `lse` also the natural log-sum-exp [B, Hq, Nq],
        float32 (-inf for a row that sees nothing). With `partials`: float32 [groups, B, Hq, Nq, D] and
        [groups, B, Hq, Nq].

    Raises:
        ValueError: shapes that do not fit each other, more than 8 new rows, or no groups where they are needed.
        RuntimeError: impl="triton" where it cannot run, or where an input requires a gradient.

    Source: split-K decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other.")
    if not 1 <= q.shape[2] <= MAX_NEW:
        raise ValueError(f"q has {q.shape[2]} new rows; decoding takes 1 to {MAX_NEW}, use grouped_attention for more.")
    if (partials or logit_map is not None) and (group is None or not 1 <= groups <= MAX_GROUPS):
        raise ValueError(
            f"partial results and logit maps need the key groups: give group, and groups 1 to {MAX_GROUPS}."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, lengths, starts, group, groups if partials else 0, bias, logit_map, head_gain, scale)
    if uses_triton(impl, q, k, v, bias, logit_map, head_gain):
        from mmefficient.kernels.decode_attention import kernel, op

        if torch.compiler.is_compiling():
            out, found = op.decode_op(*arguments)
        else:
            with launching_on(q):
                out, found = kernel.decode_attention(*arguments, lse or partials)
    else:
        out, found = reference.decode_attention(*arguments)
    return (out, found) if lse or partials else out
