"""Launches of the forward kernel: what is decided on the host, and remembered for the next layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from mmefficient.kernels.arrivals import counters
from mmefficient.kernels.common import power_below, processors
from mmefficient.kernels.grouped_attention.kernel import _forward
from mmefficient.kernels.grouped_attention.layout import Layout

MIN_BLOCKS_PER_PART = 4


def tuning(block_m: int, head_dim: int, dtype: torch.dtype, places: bool) -> dict[str, int]:
    """Warps and pipeline stages for blocks of `block_m` rows; `places`: the pattern compares places."""
    if dtype == torch.float32:
        return {"num_warps": 4, "num_stages": 1 if head_dim > 128 else 2}
    return {"num_warps": 8 if block_m * head_dim > 8192 else 4, "num_stages": 2 if head_dim > 128 or places else 3}


def parts_for(programs: int, longest: int, device: torch.device) -> int:
    """Into how many parts the keys of a query block are split: one, as soon as every processor has a program.

    Else a power of two: at least four of the `longest` key blocks to a part, eight programs to a processor, 16 parts.
    """
    if programs >= processors(device):
        return 1
    return power_below(min(longest // MIN_BLOCKS_PER_PART, 8 * processors(device) // max(programs, 1), 16))


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    scale: float,
    partials: bool,
    lse: bool = True,
    **override: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function. `override`: PARTS, TOGETHER, COPIES, num_warps, num_stages in place of the defaults."""
    made = layout.schedule
    if made is None:
        raise ValueError("this layout was made for the reference; make it with impl='auto' or 'triton'.")
    batch, heads, rows, dim = q.shape
    groups = layout.groups if partials else 1
    out = q.new_empty(groups, *q.shape, dtype=torch.float32) if partials else torch.empty_like(q)
    found = out
    if lse:
        found = torch.empty(groups, batch, heads, rows, dtype=torch.float32, device=q.device)
    if bias is not None:
        bias = bias.expand(batch, heads, k.shape[2])
        bias = bias if bias.stride(2) == 1 else bias.contiguous()
    if logit_map is not None:
        logit_map = logit_map.expand(3, batch, heads, -1)
    if head_gain is not None:
        head_gain = head_gain.expand(batch, heads, rows)
    tensors = (q, k, v, bias, logit_map, head_gain)
    key = (*(t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors), out.stride(),
           scale, partials, lse, *override.items())  # fmt: skip
    plan = made.launches.get(key)
    if plan is None:
        plan = made.launches[key] = _Launch(layout, tensors, out, scale, groups, lse, override)
    plan(q, k, v, out, found, bias, logit_map, head_gain)
    if not lse:
        return out, q.new_empty(0, dtype=torch.float32)
    return out, found if partials else found[0]


class _Launch:
    """A call of the kernel without its tensors. Triton looks at every argument of a launch, which takes longer than a
    short prompt's attention; a call like an earlier one goes past that to the kernel compiled then."""

    def __init__(
        self,
        layout: Layout,
        tensors: tuple[torch.Tensor | None, ...],
        out: torch.Tensor,
        scale: float,
        groups: int,
        lse: bool,
        override: dict[str, int],
    ) -> None:
        q, k, v, bias, logit_map, gain = tensors
        made = layout.schedule
        assert made is not None and q is not None and k is not None and v is not None
        batch, heads, rows, dim = q.shape
        inside = override.pop("INSIDE", 0)
        copies = override.pop("COPIES", int(groups == 1 and not lse and gain is None and made.left_blocks < made.rest_blocks))
        tasks = made.soft_blocks * batch * heads * groups
        parts = override.pop("PARTS", 0) or parts_for(tasks, made.longest, q.device)
        together = override.pop("TOGETHER", 0) or batch * heads
        self.spare = layout.role
        self.tasks = tasks
        self.scratch = tasks * parts * made.block_m * (dim + 1) if parts > 1 else 0
        rest_blocks = made.left_blocks if copies else made.rest_blocks
        items = made.soft_blocks * parts * (1 if inside else groups) + rest_blocks
        self.grid = (items * batch * heads, 1, 1)
        spare = (0,) * 4
        self.fixed = (
            made.lists, made.copied, made.blocks, made.counts, layout.queries, layout.rules,
            self.spare if layout.head_pattern is None else layout.head_pattern, *layout.pair_facts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.stride(0) if groups > 1 else 0, *out.stride()[-4:-1],
            *(bias.stride() if bias is not None else spare)[:2], *(logit_map.stride() if logit_map is not None else spare),
            *(gain.stride() if gain is not None else spare)[:3], scale, batch, heads, rows, k.shape[2],
            made.lists.shape[-1], *made.blocks.shape[-2:], made.soft_blocks, rest_blocks, made.blocks.shape[1], parts,
            together, heads // k.shape[1], dim, max(16, triton.next_power_of_2(dim)), made.block_m, made.block_n,
            len(layout.rules), groups, parts > 1, logit_map is not None, bias is not None, gain is not None, lse,
            bool(copies), made.contiguous, layout.page is not None, layout.segment is not None,
            layout.mask is not None, bool(inside), override.pop("AHEAD", None),
            "ieee" if q.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        self.settings = tuning(made.block_m, dim, q.dtype, layout.page is not None) | override
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, found: torch.Tensor,
                 bias: torch.Tensor | None, logit_map: torch.Tensor | None, gain: torch.Tensor | None) -> None:
        scratch = arrived = self.spare
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.float32, device=q.device)
            arrived = counters(self.tasks, q.device)
        dynamic = (
            q, k, v, out, found, scratch, arrived, self.spare if bias is None else bias,
            self.spare if logit_map is None else logit_map, self.spare if gain is None else gain,
        )  # fmt: skip
        if self.compiled is not None:
            self.compiled(*dynamic, *self.fixed)
            return
        kernel = _forward[self.grid](*dynamic, *self.fixed, **self.settings)
        if kernel is not None:  # Triton's interpreter compiles nothing
            self.compiled = kernel[self.grid]
