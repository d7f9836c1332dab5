"""`greedy_select` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.greedy_select import kernel

greedy_select_op = torch.library.custom_op(
    "mmefficient::greedy_select",
    kernel.greedy_select,
    mutates_args=(),
    schema="(Tensor pairs, Tensor valid, Tensor first, int steps, str objective) -> Tensor",
)


@greedy_select_op.register_fake
def _(pairs: torch.Tensor, valid: torch.Tensor, first: torch.Tensor, steps: int, objective: str) -> torch.Tensor:
    return valid.new_empty(valid.shape[0], steps, dtype=torch.int64)
