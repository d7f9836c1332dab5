"""`decode_attention` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.decode_attention import kernel

decode_op = torch.library.custom_op(
    "mmefficient::decode_attention",
    kernel.decode_attention,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? starts, Tensor? group, int groups, Tensor? bias, "
    "Tensor? logit_map, Tensor? head_gain, float scale) -> (Tensor, Tensor)",
)


@decode_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    group: torch.Tensor | None,
    groups: int,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    lead = (groups,) if groups else ()
    out = q.new_empty(*lead, *q.shape, dtype=torch.float32) if groups else torch.empty_like(q)
    return out, q.new_empty(*lead, *q.shape[:3], dtype=torch.float32)
