"""`rms_norm` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.rms_norm import kernel

norm_op = torch.library.custom_op(
    "mmefficient::rms_norm",
    kernel.rms_norm,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor)",
)


@norm_op.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
