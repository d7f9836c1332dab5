"""`grouped_attention` in plain torch: the specification every faster version is tested against."""

from __future__ import annotations

import torch

from mmefficient.kernels.grouped_attention.layout import Layout


def logits(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: Layout,
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Mapped and biased logits [B, Hq, Nq, Nk], -inf where no pair exists; float32, or float64 for such inputs."""
    heads, repeat = q.shape[1], q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    found = torch.matmul(q, k.repeat_interleave(repeat, 1).transpose(-1, -2)).to(wide) * scale
    if logit_map is not None:
        group = layout.role.new_zeros(layout.role.shape) if layout.group is None else layout.group
        at = group.long()[:, None].expand(-1, heads, -1)
        factor, magnitude, shift = (m.to(wide).expand(len(at), heads, -1).gather(2, at)[:, :, None] for m in logit_map)
        found = factor * found + magnitude * found.abs() + shift
    if bias is not None:
        found = found + bias.to(wide)[:, :, None]
    pairs = layout.visible()
    if layout.head_pattern is None:
        return found.masked_fill(~pairs, float("-inf"))
    return found.masked_fill(~pairs[:, layout.head_pattern.long()], float("-inf"))


def attend(found: torch.Tensor, v: torch.Tensor, gain: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, Hq, Nq, D] in the dtype of `found` and log-sum-exp [B, Hq, Nq] of rows of logits."""
    weights = found.softmax(-1).nan_to_num(0.0).to(v.dtype)
    out = torch.matmul(weights, v.repeat_interleave(found.shape[1] // v.shape[1], 1)).to(found.dtype)
    return out if gain is None else out * gain.to(found.dtype)[..., None], found.logsumexp(-1)


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    scale: float,
    partials: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function; always returns output and log-sum-exp."""
    found = logits(q, k, layout, bias, logit_map, scale)
    if not partials:
        out, lse = attend(found, v, head_gain)
        return out.to(q.dtype), lse
    group = layout.role.new_zeros(layout.role.shape) if layout.group is None else layout.group
    parts = [
        attend(found.masked_fill((group != g)[:, None, None], float("-inf")), v, head_gain)
        for g in range(layout.groups)
    ]
    return torch.stack([out.to(q.dtype) for out, _ in parts]), torch.stack([lse for _, lse in parts])
