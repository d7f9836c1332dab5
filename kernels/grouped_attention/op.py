"""`grouped_attention` as an operator of torch, whose arguments are tensors and numbers: a layout is taken apart."""

from __future__ import annotations

from dataclasses import fields

import torch

from mmefficient.kernels.grouped_attention import kernel
from mmefficient.kernels.grouped_attention.layout import Layout, Schedule

SCHEDULE = [f.name for f in fields(Schedule) if f.type == "torch.Tensor"]
NUMBERS = [f.name for f in fields(Schedule) if f.type != "torch.Tensor"]
FACTS = [f.name for f in fields(Layout) if str(f.type).startswith("torch.Tensor")]


def pack(layout: Layout) -> tuple[list[torch.Tensor], list[int]]:
    """Tensors and numbers of a layout; a bit of the first number tells which facts it has."""
    made = layout.schedule
    if made is None:
        raise ValueError("this layout was made for the reference; make it with impl='auto' or 'triton'.")
    facts = [getattr(layout, name) for name in FACTS]
    tensors = [fact for fact in facts if fact is not None] + [getattr(made, name) for name in SCHEDULE]
    present = sum(1 << i for i, fact in enumerate(facts) if fact is not None)
    return tensors, [present, layout.groups, *(int(getattr(made, name)) for name in NUMBERS)]


def unpack(tensors: list[torch.Tensor], numbers: list[int]) -> Layout:
    """The layout that `pack` took apart."""
    rest = iter(tensors)
    facts = {name: next(rest) if numbers[0] >> i & 1 else None for i, name in enumerate(FACTS)}
    made = dict(zip(SCHEDULE, rest, strict=True)) | dict(zip(NUMBERS, numbers[2:], strict=True))
    made["contiguous"] = bool(made["contiguous"])
    return Layout(groups=numbers[1], schedule=Schedule(**made), **facts)  # type: ignore[arg-type]


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: list[torch.Tensor],
    numbers: list[int],
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    scale: float,
    partials: bool,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = unpack(tensors, numbers)
    return kernel.grouped_attention(q, k, v, layout, bias, logit_map, head_gain, scale, partials, lse)


grouped_op = torch.library.custom_op(
    "mmefficient::grouped_attention",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] tensors, int[] numbers, Tensor? bias, Tensor? logit_map, "
    "Tensor? head_gain, float scale, bool partials, bool lse) -> (Tensor, Tensor)",
)


@grouped_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: list[torch.Tensor],
    numbers: list[int],
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    scale: float,
    partials: bool,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lead = (numbers[1],) if partials else ()
    out = q.new_empty(*lead, *q.shape, dtype=torch.float32) if partials else torch.empty_like(q)
    return out, q.new_empty(*lead, *q.shape[:3] if lse else (0, *q.shape[1:3]), dtype=torch.float32)
