"""`least_heads` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.least_heads import kernel

least_op = torch.library.custom_op(
    "mmefficient::least_heads",
    kernel.least_heads,
    mutates_args=(),
    schema="(Tensor query, Tensor along, Tensor factor, int count) -> Tensor",
)


@least_op.register_fake
def _(query: torch.Tensor, along: torch.Tensor, factor: torch.Tensor, count: int) -> torch.Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)
