"""`decode_attention` in Triton: split-K in one launch, lengths read on the device, no value of them on the host.

The query heads that share a key head are the rows of one program. A key group adds no pass: with partial results every
row stands there once per group and sees its group alone, and a program has at least 16 rows to fill anyway. The program
that finishes its rows last merges their parts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from mmefficient.kernels.arrivals import counters
from mmefficient.kernels.common import ceil_div, power_above, processors, shared_memory
from mmefficient.kernels.launch import Launch, begin, release

MAX_BLOCK_M = 64  # more rows go to further programs


@triton.jit
def _shaped(
    s, h, g, last, used, key, real, b, group, bias, factors, group_b, bias_b, bias_h, bias_k,
    map_f, map_b, map_h, map_g, GROUPS: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Base-2 logits behind map, bias and masks; what is known of rows and of keys broadcasts to the shape of s."""
    ok = (key <= last) & real
    if MAP or GROUPS > 1:
        of = tl.load(group + b.to(tl.int64) * group_b + key, mask=real, other=0).to(tl.int32)
        if GROUPS > 1:
            ok = ok & (of == g)
        if MAP:
            at = factors + b.to(tl.int64) * map_b + h * map_h + of * map_g
            scaled = tl.load(at, mask=used & real, other=0.0).to(tl.float32) * s
            scaled += tl.load(at + map_f, mask=used & real, other=0.0).to(tl.float32) * tl.abs(s)
            s = scaled + tl.load(at + 2 * map_f, mask=used & real, other=0.0).to(tl.float32)
    if BIAS:
        at_bias = bias + b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h + key * bias_k
        s += tl.load(at_bias, mask=used & real, other=0.0).to(tl.float32)
    return tl.where(ok, s * 1.4426950408889634, float("-inf"))


@triton.jit
def _merge(
    scratch, levels, spot, used, inside, factor, at_out, lse, d, in_d, PARTS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, SINGLE: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one program's rows; reads past the L1 cache, for other processors wrote them."""
    p = tl.arange(0, BLOCK_P)
    here = used[:, None] & (p < PARTS)[None]
    level = tl.load(levels + spot[:, None] * PARTS + p[None], mask=here, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(level, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(level - safe[:, None]), 1)
    if SINGLE:  # all parts at once, instead of one after another
        row = tl.sum(tl.where(used, spot, 0), 0) * PARTS
        base = tl.sum(tl.where(used, safe, 0.0), 0)
        each = tl.load(levels + row + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
        tile = (p < PARTS)[:, None] & in_d[None]
        values = tl.load(scratch + (row + p)[:, None] * D + d[None], mask=tile, other=0.0, cache_modifier=".cg")
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + tl.sum(values * tl.exp2(each - base)[:, None], 0)[None]
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for part in tl.range(0, PARTS, loop_unroll_factor=256 // BLOCK_M):
            at = spot * PARTS + part
            weight = tl.exp2(tl.load(levels + at, mask=used, other=float("-inf"), cache_modifier=".cg") - safe)
            values = tl.load(scratch + at[:, None] * D + d[None], mask=inside, other=0.0, cache_modifier=".cg")
            acc += values * weight[:, None]
    acc *= (factor / tl.where(total == 0, 1.0, total))[:, None]
    tl.store(at_out, acc.to(at_out.dtype.element_ty), mask=inside)
    if LSE:
        tl.store(lse + spot, (safe + tl.log2(total)) * 0.6931471805599453, mask=used)


@triton.jit
def _decode(
    q, k, v, out, lse, scratch, arrived, lengths, starts, group, bias, factors, gain,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_g, o_b, o_h, o_n, group_b, bias_b, bias_h, bias_k,
    map_f, map_b, map_h, map_g, gain_b, gain_h, gain_n, scale, batch, kv_heads, sums,
    PARTS: tl.constexpr, REPEAT: tl.constexpr, NEW: tl.constexpr, GROUPS: tl.constexpr, STARTS: tl.constexpr,
    MAP: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr, LSE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    part = tl.program_id(0)
    b = tl.program_id(1) // kv_heads
    kv = tl.program_id(1) % kv_heads
    r = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = r < REPEAT * NEW * GROUPS
    g = r // (REPEAT * NEW)
    new = r // REPEAT % NEW
    h = kv * REPEAT + r % REPEAT
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = d < D
    length = tl.load(lengths + b).to(tl.int32)
    start = length * 0
    if STARTS:
        start += tl.load(starts + b).to(tl.int32)
    each = tl.cdiv(tl.cdiv(tl.maximum(length - start, 0), PARTS), BLOCK_N) * BLOCK_N
    first = start + part * each
    stop = tl.minimum(first + each, length)
    k += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    last = length - NEW + new
    at_q = q + b.to(tl.int64) * q_b + (h * q_h + new * q_n)[:, None].to(tl.int64) + d[None]
    x = tl.load(at_q, mask=used[:, None] & in_d[None], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(first, stop, BLOCK_N):
        key = block + n
        real = key < stop
        y = tl.load(k + key[None].to(tl.int64) * k_n + d[:, None], mask=real[None] & in_d[:, None], other=0.0)
        z = tl.load(v + key[:, None].to(tl.int64) * v_n + d[None], mask=real[:, None] & in_d[None], other=0.0)
        s = tl.dot(x, y, input_precision=PRECISION) * scale
        s = _shaped(s, h[:, None], g[:, None], last[:, None], used[:, None], key[None], real[None], b, group, bias,
                    factors, group_b, bias_b, bias_h, bias_k, map_f, map_b, map_h, map_g,
                    GROUPS, MAP, BIAS)  # fmt: skip
        best = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        weight = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(z.dtype), z, acc * fade[:, None], input_precision=PRECISION)
        top = best
    release(OVERLAP)
    heads = kv_heads * REPEAT
    spot = ((g * batch + b) * heads + h).to(tl.int64) * NEW + new
    inside = used[:, None] & in_d[None]
    at_out = out + g.to(tl.int64) * o_g + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + new * o_n
    at_out = at_out[:, None] + d[None]
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if GAIN:
        at_gain = gain + b.to(tl.int64) * gain_b + h.to(tl.int64) * gain_h + new * gain_n
        factor = tl.load(at_gain, mask=used, other=0.0).to(tl.float32)
    level = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    if PARTS == 1:
        tl.store(at_out, (acc * factor[:, None]).to(out.dtype.element_ty), mask=inside)
        if LSE:
            tl.store(lse + spot, level * 0.6931471805599453, mask=used)
    else:
        levels = scratch + sums * (PARTS * D)
        tl.store(levels + spot * PARTS + part, level, mask=used)
        tl.store(scratch + (spot * PARTS + part)[:, None] * D + d[None], acc, mask=inside)
        tl.debug_barrier()  # every thread has stored before one of them says so
        at = arrived + tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        if tl.atomic_add(at, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.store(at, 0)
            _merge(scratch, levels, spot, used, inside, factor, at_out, lse, d, in_d, PARTS, D, BLOCK_M, BLOCK_D,
                   BLOCK_P, REPEAT * NEW * GROUPS == 1, LSE)  # fmt: skip


def tuning(rows: int, head_dim: int, dtype: torch.dtype, limit: int) -> dict[str, int]:
    """Block sizes and stages for `rows` query rows per key head that fit `limit` bytes of shared memory."""
    narrow = dtype == torch.float32 or head_dim > 128
    block_d = max(16, power_above(head_dim))
    chosen = {"BLOCK_M": min(max(16, power_above(rows)), MAX_BLOCK_M), "BLOCK_N": 32 if narrow else 64}
    chosen["num_stages"] = 2 if narrow else 3
    for name, least in (("num_stages", 1), ("BLOCK_N", 16), ("BLOCK_M", 16)):
        while need(chosen, block_d, dtype.itemsize) > limit and chosen[name] > least:
            chosen[name] -= 1 if name == "num_stages" else chosen[name] // 2
    return chosen


def need(chosen: dict[str, int], block_d: int, itemsize: int) -> int:
    """Bytes of shared memory, at most: queries, the pipeline of keys and values, and rows spread over the warps."""
    rows, keys = chosen["BLOCK_M"], chosen["BLOCK_N"]
    pipeline = itemsize * block_d * (rows + 2 * chosen["num_stages"] * keys)
    return pipeline + 4 * rows * (block_d + 2 * keys) + 1024


def parts_for(programs: int, key_blocks: int, rows: int, device: torch.device) -> int:
    """Into how many parts the keys are split: two programs to a processor, or one if merging has several rows to write.

    A part has two key blocks at least, or three: with one, there is nothing to load while it is worked on.
    """
    resident, least = (2, 2) if rows == 1 else (1, 3)
    return max(1, min(resident * processors(device) // programs, ceil_div(key_blocks, least), 64))


Strides = tuple[int, ...]


@lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, int, int, int],
    kv_heads: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
    groups: int,
    lse: bool,
    scale: float,
    strides: tuple[Strides, ...],
    group: int | None,
    bias: Strides | None,
    factors: Strides | None,
    gain: Strides | None,
    starts: bool,
    override: tuple[tuple[str, int], ...],
) -> tuple[Launch, tuple[int, int, int], int]:
    """A launch, its grid and the number of floats that its parts take: all that is the same from step to step.

    `strides`: those of q, k, v and the output; `group`, `bias`, `factors` and `gain`: strides of what is given, None
    for what is not.
    """
    batch, heads, new, dim = shape
    repeat, copies = heads // kv_heads, max(groups, 1)
    rows = repeat * new * copies
    options = tuning(rows, dim, dtype, shared_memory(device)) | dict(override)
    block_m, block_n = options.pop("BLOCK_M"), options.pop("BLOCK_N")
    row_blocks = ceil_div(rows, block_m)
    programs = batch * kv_heads * row_blocks
    parts = options.pop("PARTS", 0) or parts_for(programs, ceil_div(room, block_n), rows, device)
    crowd = 1 < rows <= 16 and parts > 8  # many parts of several rows are merged faster by more threads
    options.setdefault("num_warps", 8 if crowd else 4)
    lead = strides[3][0] if groups else 0
    numbers = (
        *(n for each in strides[:3] for n in each[:3]), lead, *strides[3][-4:-1], group or 0, *(bias or (0,) * 3),
        *(factors or (0,) * 4),
        *(gain or (0,) * 3), scale, batch, kv_heads, copies * batch * heads * new,
    )  # fmt: skip
    constants = (
        parts, repeat, new, copies, starts, factors is not None, bias is not None, gain is not None, lse, dim,
        max(16, power_above(dim)), block_m, block_n, power_above(parts), "ieee" if dtype == torch.float32 else "tf32",
    )  # fmt: skip
    room_of_parts = copies * batch * heads * new * parts * (dim + 1) if parts > 1 else 0
    return Launch(_decode, numbers, constants, **options), (parts, batch * kv_heads, row_blocks), room_of_parts


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    group: torch.Tensor | None,
    groups: int,
    bias: torch.Tensor | None,
    logit_map: torch.Tensor | None,
    head_gain: torch.Tensor | None,
    scale: float,
    lse: bool = True,
    **override: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the public function. `override`: PARTS, num_warps and what `tuning` gives, in place of the defaults."""
    batch, heads, new, _ = q.shape
    _, kv_heads, room, _ = k.shape
    lead = (groups,) if groups else ()
    out = q.new_empty(*lead, *q.shape, dtype=torch.float32) if groups else torch.empty_like(q)
    found = torch.empty(*lead, batch, heads, new, dtype=torch.float32, device=q.device) if lse else None
    bias = None if bias is None else bias.expand(batch, heads, room)
    factors = None if logit_map is None else logit_map.expand(3, batch, heads, -1)
    gain = None if head_gain is None else head_gain.expand(batch, heads, new)
    run, grid, parted = plan(
        q.shape, kv_heads, room, q.dtype, q.device, groups, lse, scale,
        (q.stride(), k.stride(), v.stride(), out.stride()), None if group is None else group.stride(0),
        None if bias is None else bias.stride(), None if factors is None else factors.stride(),
        None if gain is None else gain.stride(), starts is not None, tuple(override.items()),
    )  # fmt: skip
    absent = lengths  # what is not given is not read
    scratch = arrived = absent
    if parted:  # outputs of the parts, then their log-sum-exps
        scratch = torch.empty(parted, dtype=torch.float32, device=q.device)
        arrived = counters(grid[1] * grid[2], q.device)
    optional = [absent if t is None else t for t in (starts, group, bias, factors, gain)]
    run(grid, q, k, v, out, absent if found is None else found, scratch, arrived, lengths, *optional)
    return out, found
