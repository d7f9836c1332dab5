"""`compact` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.compact import kernel

compact_op = torch.library.custom_op(
    "mmefficient::compact",
    kernel.gather_two,
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor keep) -> (Tensor, Tensor)",
)


@compact_op.register_fake
def _(x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [(*t.shape[:2], keep.shape[2], t.shape[3]) for t in (x, y)]
    return x.new_empty(sizes[0]), y.new_empty(sizes[1])
