"""`group_mix` as an operator of torch."""

from __future__ import annotations

from typing import Any

import torch

from mmefficient.kernels.group_mix import kernel

mix_op = torch.library.custom_op(
    "mmefficient::group_mix",
    kernel.group_mix,
    mutates_args=(),
    schema="(Tensor out, Tensor lse, Tensor where, Tensor move, Tensor least, ScalarType dtype) -> Tensor",
)


@mix_op.register_fake
def _(
    out: torch.Tensor, lse: torch.Tensor, where: torch.Tensor, move: torch.Tensor, least: torch.Tensor, dtype: Any
) -> torch.Tensor:
    _, batch, heads, rows, dim = out.shape
    return out.new_empty(batch, rows, heads, dim, dtype=dtype).transpose(1, 2)
