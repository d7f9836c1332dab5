"""`grouped_attention` as an operator of torch, whose arguments are tensors and numbers: a layout is taken apart."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from weakref import WeakValueDictionary

import torch

from mmefficient.kernels.grouped_attention import backward, forward
from mmefficient.kernels.grouped_attention.layout import Layout, Schedule

SCHEDULE = [f.name for f in fields(Schedule) if f.type == "torch.Tensor"]
NUMBERS = [f.name for f in fields(Schedule) if f.type in ("int", "bool")]
FACTS = [f.name for f in fields(Layout) if str(f.type).startswith("torch.Tensor")]


_packed: WeakValueDictionary[int, Layout] = WeakValueDictionary()


def pack(layout: Layout) -> tuple[list[torch.Tensor], list[int]]:
    """Tensors and numbers of a layout; a bit of the first number tells which facts it has."""
    made = layout.schedule
    if made is None:
        raise ValueError("this layout was made for the reference; make it with impl='auto' or 'triton'.")
    facts = [getattr(layout, name) for name in FACTS]
    tensors = [fact for fact in facts if fact is not None] + [getattr(made, name) for name in SCHEDULE]
    present = sum(1 << i for i, fact in enumerate(facts) if fact is not None)
    if not torch.compiler.is_compiling():
        _packed[made.lists.data_ptr()] = layout
    return tensors, [present, layout.groups, *(int(getattr(made, name)) for name in NUMBERS)]


def unpack(tensors: list[torch.Tensor], numbers: list[int]) -> Layout:
    """The layout that `pack` took apart: while it lives itself, with all that it knows of earlier calls."""
    alive = _packed.get(tensors[-len(SCHEDULE)].data_ptr())
    if alive is not None:
        known, same = pack(alive)
        if same == numbers and all(a is b for a, b in zip(known, tensors, strict=True)):
            return alive
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
    out, found = forward.grouped_attention(q, k, v, layout, bias, logit_map, head_gain, scale, partials, lse)
    lead = (numbers[1],) if partials else ()
    return out, q.new_empty(*lead, *q.shape[:2], 0, dtype=torch.float32) if found is None else found


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
    out = q.new_empty(*lead, *q.shape) if partials else torch.empty_like(q)
    return out, q.new_empty(*lead, *q.shape[:2], q.shape[2] if lse else 0, dtype=torch.float32)


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    tensors: list[torch.Tensor],
    numbers: list[int],
    bias: torch.Tensor | None,
    scale: float,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = unpack(tensors, numbers)
    return backward.grouped_attention_backward(q, k, v, out, lse, d_out, d_lse, layout, bias, scale, bias_grad)


backward_op = torch.library.custom_op(
    "mmefficient::grouped_attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, Tensor[] tensors, "
    "int[] numbers, Tensor? bias, float scale, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)


@backward_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    tensors: list[torch.Tensor],
    numbers: list[int],
    bias: torch.Tensor | None,
    scale: float,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    d_bias = q.new_empty(*q.shape[:2], k.shape[2] if bias_grad else 0, dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, tensors, numbers, bias, logit_map, head_gain, scale, partials, lse = inputs
    if logit_map is not None or head_gain is not None or partials or not lse:
        raise RuntimeError("the backward of the kernel needs the log-sum-exp and knows no groups, maps or gains.")
    ctx.save_for_backward(q, k, v, bias, *output, *tensors)
    ctx.numbers, ctx.scale = numbers, scale
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, bias, out, lse, *tensors = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    wanted = ctx.needs_input_grad[5]
    found = backward_op(q, k, v, out, lse, d_out, d_lse, tensors, ctx.numbers, bias, ctx.scale, wanted)
    d_bias = found[3].to(bias.dtype) if wanted else None
    return *found[:3], [None] * len(tensors), None, d_bias, None, None, None, None, None


grouped_op.register_autograd(_differentiate, setup_context=_remember)
