"""`decode_attention` in plain torch: the specification every faster version is tested against."""

from __future__ import annotations

import torch


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    group: torch.Tensor | None,
    groups: int,
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function; `groups` > 0 asks for partial results. Always returns output and log-sum-exp."""
    batch, heads, new, _ = q.shape
    room, repeat = k.shape[2], heads // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    key = torch.arange(room, device=q.device)
    last = lengths[:, None].long() - new + torch.arange(new, device=q.device)
    seen = key <= last[..., None]
    if starts is not None:
        seen = seen & (key >= starts[:, None, None])
    stored = (key < lengths[:, None])[:, None, :, None]  # behind them the buffers may hold anything
    k, v = k.where(stored, 0).repeat_interleave(repeat, 1), v.where(stored, 0).repeat_interleave(repeat, 1)
    found = torch.matmul(q, k.transpose(-1, -2)).to(wide) * scale
    of = torch.zeros_like(seen[:, 0], dtype=torch.long) if group is None else group.long().where(stored[:, 0, :, 0], 0)
    if logit_map is not None:
        at = of[:, None].expand(-1, heads, -1)
        factor, magnitude, shift = (m.to(wide).expand(batch, heads, -1).gather(2, at)[:, :, None] for m in logit_map)
        found = factor * found + magnitude * found.abs() + shift
    if bias is not None:
        found = found + bias.to(wide)[:, :, None]
    outs, sums = [], []
    for g in range(max(groups, 1)):
        mine = seen & (of == g)[:, None] if groups else seen
        masked = found.masked_fill(~mine[:, None], float("-inf"))
        out = torch.matmul(masked.softmax(-1).nan_to_num(0.0).to(v.dtype), v).to(wide)
        outs.append(out if head_gain is None else out * head_gain.to(wide)[..., None])
        sums.append(masked.logsumexp(-1))
    if groups:
        return torch.stack(outs), torch.stack(sums)
    return outs[0].to(q.dtype), sums[0]
