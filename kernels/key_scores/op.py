"""`key_scores` as an operator of torch."""

from __future__ import annotations

import torch

from mmefficient.kernels.key_scores import kernel

key_scores_op = torch.library.custom_op(
    "mmefficient::key_scores",
    kernel.key_scores,
    mutates_args=(),
    schema="(Tensor query, Tensor key, float scale, Tensor? mask, Tensor? last, Tensor? lse) -> Tensor",
)


@key_scores_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], key.shape[2], dtype=torch.float32)
