"""Launches of the forward kernel: what is decided on the host, and remembered for the next layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mmefficient.kernels.arrivals import counters
from mmefficient.kernels.common import ceil_div, power_above, power_below, processors
from mmefficient.kernels.grouped_attention.kernel import _forward
from mmefficient.kernels.grouped_attention.layout import Layout, Schedule

MOST_PARTS = 16


class Inputs(NamedTuple):
    """Tensors of a call; the optional ones are spread to [B, Hq, Nk], [3, B, Hq, groups] and [B, Hq, Nq]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    logit_map: torch.Tensor | None
    head_gain: torch.Tensor | None

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that a compiled kernel and its launch depend on."""
        return tuple(
            [t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16) for t in self]
        )


def tuning(block_m: int, head_dim: int, dtype: torch.dtype, places: bool) -> dict[str, int]:
    """Warps and pipeline stages for blocks of `block_m` rows; `places`: the pattern compares places."""
    if dtype == torch.float32:
        return {"num_warps": 4, "num_stages": 1 if head_dim > 128 else 2}
    return {"num_warps": 8 if block_m * head_dim > 8192 else 4, "num_stages": 2 if head_dim > 128 or places else 3}


def parts_for(programs: int, longest: int, device: torch.device) -> int:
    """Into how many parts the keys of a query block are split: a power of two.

    A processor holds two programs. Parts of two key blocks or more pay until each has one, parts of eleven or more
    until each has two: shorter ones save less than merging costs.

    Args:
        programs: query blocks of all heads and groups, counted in those of the `longest` list of key blocks.
    """
    programs, room = max(programs, 1), processors(device)
    first, second = min(longest // 2, 5 * room // (4 * programs)), min(longest // 11, 2 * room // programs)
    return power_below(min(max(first, second), MOST_PARTS))


def padded_rows(bias: torch.Tensor, block: int) -> torch.Tensor:
    """[B, Hq, Nk] whose keys follow each other in memory.

    With a `block` of 16 or more, rows begin at multiples of 16 and may be read up to the end of the last key block.
    """
    batch, heads, keys = bias.shape
    wide = ceil_div(keys, block) * block
    if wide == keys and bias.stride(2) == 1 and not (bias.stride(0) | bias.stride(1)) % min(block, 16):
        return bias
    found = torch.empty(batch, heads, wide, dtype=bias.dtype, device=bias.device)[..., :keys]
    return found.copy_(bias)


def pads(made: Schedule) -> bool:
    """Whether a bias is read so often, by more than four query blocks, that rows for wide reads are worth a copy."""
    return made.work > 4 * made.copied.shape[:2].numel() * made.blocks.shape[-1]


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the public function. `override`: PARTS, COPIES, num_warps, num_stages in place of the defaults."""
    made = layout.schedule
    if made is None:
        raise ValueError("this layout was made for the reference; make it with impl='auto' or 'triton'.")
    batch, heads, rows = q.shape[:3]
    groups = layout.groups if partials else 1
    if bias is not None:
        bias = padded_rows(bias.expand(batch, heads, k.shape[2]), made.block_n if pads(made) else 1)
    if logit_map is not None:
        logit_map = logit_map.expand(3, batch, heads, -1)
    if head_gain is not None:
        head_gain = head_gain.expand(batch, heads, rows)
    inputs = Inputs(q, k, v, bias, logit_map, head_gain)
    out = q.new_empty(groups, *q.shape) if partials else torch.empty_like(q)
    lead = (groups,) if partials else ()
    found = torch.empty(*lead, batch, heads, rows, dtype=torch.float32, device=q.device) if lse else None
    key = (inputs.signature, scale, partials, lse, *override.items())
    launch = made.launches.get(key)
    if launch is None:
        launch = made.launches[key] = _prepare(inputs, out, layout, scale, groups, lse, override)
    launch(inputs, out, found)
    return out, found


def _prepare(
    inputs: Inputs, out: torch.Tensor, layout: Layout, scale: float, groups: int, lse: bool, override: dict[str, int]
) -> Callable[[Inputs, torch.Tensor, torch.Tensor | None], None]:
    """A function that launches calls like this one.

    Triton looks at every argument of a launch, which takes longer than a short prompt's attention; all but the first
    call go past that to the kernel compiled by the first one, with addresses in place of tensors (see `Launch`).
    """
    q, k, v, bias, logit_map, gain = inputs
    made, device, spare = layout.schedule, q.device, layout.role
    assert made is not None
    batch, heads, rows, dim = q.shape
    tasks = made.soft_blocks * batch * heads * groups
    programs = ceil_div(made.work * heads * groups // len(layout.rules), max(made.longest, 1))
    parts = override.get("PARTS", 0) or parts_for(programs, made.longest, device)
    plain = groups == 1 and not lse and gain is None
    # with one program of attention to a processor there is room for programs that copy rows beside them
    busy = programs * parts > processors(device)
    copies = bool(override.get("COPIES", plain and busy and made.left_blocks < made.rest_blocks))
    strides = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.stride(0) if out.ndim == 5 else 0, *out.stride()[-4:-1],
        *((0, 0) if bias is None else bias.stride()[:2]), *((0,) * 4 if logit_map is None else logit_map.stride()),
        *((0,) * 3 if gain is None else gain.stride()),
    )  # fmt: skip
    settings = tuning(made.block_m, dim, q.dtype, layout.page is not None) | override
    shared = (
        made.lists, made.copied, made.blocks, made.counts, layout.rules,
        spare if layout.head_pattern is None else layout.head_pattern, *layout.pair_facts,
    )  # fmt: skip
    fixed = (
        *[t.data_ptr() for t in shared], *strides, scale,
        batch, heads, rows, k.shape[2], made.lists.shape[-1], *made.blocks.shape[-2:], made.soft_blocks,
        made.blocks.shape[1],
        heads // k.shape[1], dim, max(16, power_above(dim)), made.block_m, made.block_n, len(layout.rules), groups,
        parts, logit_map is not None, bias is not None, pads(made), gain is not None, lse, copies,
        made.contiguous and logit_map is None, layout.page is not None, layout.segment is not None,
        layout.mask is not None, "ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    rest_blocks = made.left_blocks if copies else made.rest_blocks
    grid = ((made.soft_blocks * parts * groups + rest_blocks) * batch * heads, 1, 1)
    room = tasks * parts * made.block_m * (dim + 1) if parts > 1 else 0
    options = {name: settings[name] for name in ("num_warps", "num_stages")}
    run: Callable[..., Any] | None = None

    def launch(inputs: Inputs, out: torch.Tensor, found: torch.Tensor | None) -> None:
        nonlocal run
        scratch = arrived = spare
        if room:
            scratch, arrived = torch.empty(room, dtype=torch.float32, device=device), counters(tasks, device)
        given = [*inputs[:3], out, found, scratch, arrived, *inputs[3:]]
        tensors = [spare if t is None else t for t in given]
        if run is not None:
            run(*[t.data_ptr() for t in tensors], *fixed)
            return
        kernel = _forward[grid](*tensors, *shared, *fixed[len(shared) :], **options)
        if kernel is not None:  # Triton's interpreter compiles nothing
            run = kernel[grid]

    return launch
