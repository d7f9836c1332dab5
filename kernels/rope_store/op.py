"""`rope_store` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.rope_store import kernel

rope_op = torch.library.custom_op(
    "mmefficient::rope_store",
    kernel.rope_store,
    mutates_args=("k_cache", "v_cache"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slots) -> Tensor",
)


@rope_op.register_fake
def _(q: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape).transpose(1, 2)
