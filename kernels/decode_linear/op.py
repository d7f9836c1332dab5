"""`decode_linear` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.decode_linear import kernel

linear_op = torch.library.custom_op(
    "mmefficient::decode_linear",
    kernel.decode_linear,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm, float eps, bool gated, Tensor? residual) "
    "-> Tensor",
)


@linear_op.register_fake
def _(
    x: torch.Tensor, weights: list[torch.Tensor], biases: object, norm: object, eps: float, gated: bool, _: object
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weights[0].shape[0] if gated else sum(w.shape[0] for w in weights))
