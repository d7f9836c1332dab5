"""Attention under a pattern of pairs, with keys in groups: one op for every method that changes attention."""

from __future__ import annotations

import torch

from mmefficient.kernels.common import Impl, launching_on, needs_gradient, uses_triton
from mmefficient.kernels.grouped_attention import reference
from mmefficient.kernels.grouped_attention.layout import Layout, make_layout
from mmefficient.kernels.grouped_attention.pattern import (
    Pattern,
    causal,
    image_sees_question,
    no_visual_self_attention,
    pages_apart,
    window,
)

__all__ = [
    "Layout",
    "Pattern",
    "causal",
    "grouped_attention",
    "image_sees_question",
    "make_layout",
    "masses",
    "mix",
    "no_visual_self_attention",
    "pages_apart",
    "window",
]


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    *,
    bias: torch.Tensor | None = None,
    logit_map: torch.Tensor | None = None,
    head_gain: torch.Tensor | None = None,
    scale: float | None = None,
    partials: bool = False,
    lse: bool = False,
    impl: Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the pairs of `layout`. Differentiable; with partial results or a logit map by the reference alone.

    Logits s = scale * q.k become a * s + b * |s| + c, where the key's group has a map, plus the key's bias; pairs that
    do not exist are -inf; the softmax and all sums run in float32. A row that sees nothing gives zeros.

    Args:
        q: [B, Hq, Nq, D], float16, bfloat16 or float32; k, v: [B, Hkv, Nk, D] with Hkv dividing Hq; any strides with
            the last one 1. Nk >= Nq: rows stand for the keys that `layout` names.
        layout: from `make_layout`, shared by all layers of a prompt.
        bias: added to the logits, broadcastable to [B, Hq, Nk].
        logit_map: (a, b, c) per head and key group, [3, B or 1, Hq, groups]. An additive bias per group is
            a = 1, b = 0, c.
        head_gain: factor on the output, broadcastable to [B, Hq, Nq].
        scale: positive; None = D ** -0.5.
        partials: return every key group's own softmax instead of one over all keys. With m_g its mass under the whole
            softmax, softmax over g of the log-sum-exps, plain attention is the sum of m_g * out_g, and any other mix of
            masses is a method (`mix`).
        lse: also return the log-sum-exp.
        impl: "auto", "triton" or "reference".

    Returns:
        out [B, Hq, Nq, D] in the dtype and memory order of q; with `lse` also the natural log-sum-exp [B, Hq, Nq],
        float32 (-inf for a row that sees nothing). With `partials`: [groups, B, Hq, Nq, D] in the dtype of q, and
        [groups, B, Hq, Nq].

    Raises:
        ValueError: shapes that do not fit each other, or a scale that is not positive.
        RuntimeError: impl="triton" where it cannot run, or for gradients through partial results or a map.
    """
    _check(q, k, v, layout, bias, logit_map, head_gain, partials)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale has to be positive, not {scale}.")
    tensors = (q, k, v, bias, logit_map, head_gain)
    differentiable = not partials and logit_map is None
    if uses_triton(impl, *tensors, backward=differentiable):
        from mmefficient.kernels.grouped_attention import forward, op

        options = (bias, logit_map, head_gain, scale, partials, lse or partials)
        if needs_gradient(*tensors):
            spread = None if bias is None else bias.expand(*q.shape[:2], k.shape[2])
            out, found = op.grouped_op(q, k, v, *op.pack(layout), spread, None, None, scale, False, True)
            out = out if head_gain is None else (out * head_gain[..., None]).to(q.dtype)
        elif torch.compiler.is_compiling():
            out, found = op.grouped_op(q, k, v, *op.pack(layout), *options)
        else:  # past the dispatch of torch, which takes longer than a short prompt's attention
            with launching_on(q):
                out, found = forward.grouped_attention(q, k, v, layout, *options)
    else:
        out, found = reference.grouped_attention(q, k, v, layout, bias, logit_map, head_gain, scale, partials)
    return (out, found) if lse or partials else out


def mix(out: torch.Tensor, lse: torch.Tensor, mass: torch.Tensor | None = None) -> torch.Tensor:
    """Partial results mixed by `mass`: the sum over groups of mass_g * out_g.

    Args:
        out: [groups, B, Hq, Nq, D]; lse: [groups, B, Hq, Nq].
        mass: [groups, B, Hq, Nq]; None = the groups' own masses, which gives plain attention.
    """
    return ((masses(lse) if mass is None else mass)[..., None] * out).sum(0)


def masses(lse: torch.Tensor) -> torch.Tensor:
    """Share of the attention that each group has in every row, [groups, B, Hq, Nq]; zeros where a row sees nothing."""
    return lse.softmax(0).nan_to_num(0.0)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    partials: bool,
) -> None:
    expected = (*layout.queries.shape, layout.role.shape[1])
    given = (q.shape[0], q.shape[2], k.shape[2])
    if given != expected:
        raise ValueError(f"the layout is for (batch, rows, keys) = {expected}; q and k have {given}.")
    if k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other.")
    if (partials or logit_map is not None) and layout.group is None:
        raise ValueError("partial results and logit maps need a layout with key groups; give make_layout group=...")
    if logit_map is not None and logit_map.shape[-1] != layout.groups:
        raise ValueError(f"logit_map has {logit_map.shape[-1]} groups, the layout {layout.groups}.")
