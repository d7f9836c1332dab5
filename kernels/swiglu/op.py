"""`swiglu` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.swiglu import kernel

swiglu_op = torch.library.custom_op(
    "mmefficient::swiglu", kernel.swiglu, mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor"
)


@swiglu_op.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)
