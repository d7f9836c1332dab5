"""`group_mix` in plain torch: the specification of the kernel."""

from __future__ import annotations

import torch


def group_mix(
    out: torch.Tensor,
    lse: torch.Tensor,
    where: torch.Tensor,
    move: torch.Tensor,
    least: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See the public function."""
    mass = lse.softmax(0).nan_to_num(0.0)

    def weighed(by: torch.Tensor) -> torch.Tensor:
        return (by[:, None, None, None] * mass).sum(0)

    acts = where[..., None]
    for row in least:
        acts = acts & (weighed(row[:-1]) >= row[-1])
    new = torch.stack([weighed(row) for row in move])
    mixed = (torch.where(acts, new, mass)[..., None] * out).sum(0)
    return mixed.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
