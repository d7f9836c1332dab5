"""`decode_attention` in Triton: split-K, lengths read on the device, no value of them on the host.

The query heads that share a key head are the rows of one program. A key group adds no pass: with partial results every
row stands there once per group and sees its group alone, and a program has at least 16 rows to fill anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmefficient.kernels.common import processors, shared_memory
from mmefficient.kernels.merge import merge

MAX_BLOCK_M = 64  # more rows go to further programs


@triton.jit
def _decode(
    q, k, v, out, lse, part_out, part_lse, lengths, starts, group, bias, factors, gain,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_g, o_b, o_h, o_n, group_b, bias_b, bias_h, bias_k,
    map_f, map_b, map_h, map_g, gain_b, gain_h, gain_n, scale, batch, kv_heads, parts,
    REPEAT: tl.constexpr, NEW: tl.constexpr, GROUPS: tl.constexpr, STARTS: tl.constexpr, SPLIT: tl.constexpr,
    MAP: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    each = tl.cdiv(tl.cdiv(tl.maximum(length - start, 0), parts), BLOCK_N) * BLOCK_N
    first = start + part * each
    stop = tl.minimum(first + each, length)
    heads = kv_heads * REPEAT
    at_q = q + b.to(tl.int64) * q_b + (h * q_h + new * q_n)[:, None].to(tl.int64) + d[None]
    x = tl.load(at_q, mask=used[:, None] & in_d[None], other=0.0)
    k += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    last = length - NEW + new
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(first, stop, BLOCK_N):
        key = block + n
        real = key < stop
        y = tl.load(k + key[None].to(tl.int64) * k_n + d[:, None], mask=real[None] & in_d[:, None], other=0.0)
        z = tl.load(v + key[:, None].to(tl.int64) * v_n + d[None], mask=real[:, None] & in_d[None], other=0.0)
        s = tl.dot(x, y, input_precision=PRECISION) * scale
        ok = (key[None] <= last[:, None]) & real[None]
        if MAP or GROUPS > 1:
            of = tl.load(group + b.to(tl.int64) * group_b + key, mask=real, other=0).to(tl.int32)
            if GROUPS > 1:
                ok = ok & (of[None] == g[:, None])
            if MAP:
                at = factors + b.to(tl.int64) * map_b + (h * map_h)[:, None] + (of * map_g)[None]
                here = used[:, None] & real[None]
                scaled = tl.load(at, mask=here, other=0.0).to(tl.float32) * s
                scaled += tl.load(at + map_f, mask=here, other=0.0).to(tl.float32) * tl.abs(s)
                s = scaled + tl.load(at + 2 * map_f, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            at_bias = bias + b.to(tl.int64) * bias_b + h[:, None].to(tl.int64) * bias_h + key[None] * bias_k
            s += tl.load(at_bias, mask=used[:, None] & real[None], other=0.0).to(tl.float32)
        s = tl.where(ok, s * 1.4426950408889634, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        weight = tl.exp2(s - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(z.dtype), z, acc * fade[:, None], input_precision=PRECISION)
        top = best
    factor = 1.0 / tl.where(total == 0, 1.0, total)
    if GAIN:
        at_gain = gain + b.to(tl.int64) * gain_b + h.to(tl.int64) * gain_h + new * gain_n
        factor *= tl.load(at_gain, mask=used, other=0.0).to(tl.float32)
    acc = acc * factor[:, None]
    level = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    spot = (((g * parts + part) * batch + b) * heads + h).to(tl.int64) * NEW + new
    if SPLIT:
        tl.store(part_lse + spot, level, mask=used)
        tl.store(part_out + spot[:, None] * D + d[None], acc, mask=used[:, None] & in_d[None])
    else:
        at_out = out + g.to(tl.int64) * o_g + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + new * o_n
        tl.store(at_out[:, None] + d[None], acc.to(out.dtype.element_ty), mask=used[:, None] & in_d[None])
        tl.store(lse + spot, level * 0.6931471805599453, mask=used)


def tuning(rows: int, head_dim: int, dtype: torch.dtype, limit: int) -> dict[str, int]:
    """Block sizes, warps and stages for `rows` query rows per key head that fit `limit` bytes of shared memory."""
    narrow = dtype == torch.float32 or head_dim > 128
    block_d = max(16, triton.next_power_of_2(head_dim))
    chosen = {"BLOCK_M": min(max(16, triton.next_power_of_2(rows)), MAX_BLOCK_M)}
    chosen |= {"BLOCK_N": 32 if narrow else 64, "num_warps": 4, "num_stages": 2 if narrow else 3}
    for name, least in (("num_stages", 1), ("BLOCK_N", 16), ("BLOCK_M", 16)):
        while need(chosen, block_d, dtype.itemsize) > limit and chosen[name] > least:
            chosen[name] -= 1 if name == "num_stages" else chosen[name] // 2
    return chosen


def need(chosen: dict[str, int], block_d: int, itemsize: int) -> int:
    """Bytes of shared memory, at most: queries, the pipeline of keys and values, and rows spread over the warps."""
    rows, keys = chosen["BLOCK_M"], chosen["BLOCK_N"]
    pipeline = itemsize * block_d * (rows + 2 * chosen["num_stages"] * keys)
    return pipeline + 4 * rows * (block_d + 2 * keys) + 1024


def parts_for(programs: int, key_blocks: int, device: torch.device) -> int:
    """Into how many parts the keys are split: one, without a second launch, once every processor has a program."""
    if programs >= processors(device):
        return 1
    return max(1, min(triton.cdiv(4 * processors(device), programs), key_blocks, 64))


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
    **override: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function. `override`: PARTS and what `tuning` gives, in place of the defaults."""
    batch, heads, new, dim = q.shape
    kv_heads, room = k.shape[1:3]
    repeat, copies = heads // kv_heads, max(groups, 1)
    rows = repeat * new * copies
    settings = tuning(rows, dim, q.dtype, shared_memory(q.device)) | override
    row_blocks = triton.cdiv(rows, settings["BLOCK_M"])
    parts = settings.pop("PARTS", 0)
    parts = parts or parts_for(batch * kv_heads * row_blocks, triton.cdiv(room, settings["BLOCK_N"]), q.device)
    out = q.new_empty(groups, *q.shape, dtype=torch.float32) if groups else torch.empty_like(q)
    lse = torch.empty(copies, batch, heads, new, dtype=torch.float32, device=q.device)
    part_out = part_lse = lse
    if parts > 1:
        part_out = torch.empty(copies * parts, batch, heads, new, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(copies * parts, batch, heads, new, dtype=torch.float32, device=q.device)
    gain_strides: tuple[int, ...] = (0, 0, 0)
    gain = lengths
    if head_gain is not None:
        gain = head_gain.expand(batch, heads, new)
        gain_strides = gain.stride()
    bias_strides: tuple[int, ...] = (0, 0, 0)
    bias_row = lengths
    if bias is not None:
        bias_row = bias.expand(batch, heads, room)
        bias_strides = bias_row.stride()
    map_strides: tuple[int, ...] = (0, 0, 0, 0)
    factors = lengths
    if logit_map is not None:
        factors = logit_map.expand(3, batch, heads, -1)
        map_strides = factors.stride()
    _decode[(parts, batch * kv_heads, row_blocks)](
        q, k, v, out, lse, part_out, part_lse, lengths, lengths if starts is None else starts,
        lengths if group is None else group, bias_row, factors, gain,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.stride(0) if groups else 0, *out.stride()[-4:-1],
        0 if group is None else group.stride(0), *bias_strides, *map_strides, *gain_strides,
        scale, batch, kv_heads, parts,
        REPEAT=repeat, NEW=new, GROUPS=copies, STARTS=starts is not None, SPLIT=parts > 1,
        MAP=logit_map is not None, BIAS=bias is not None, GAIN=head_gain is not None, D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **settings,
    )  # fmt: skip
    if parts > 1:
        merge(part_out, part_lse, out, lse, parts, new)
    return out, (lse if groups else lse.squeeze(0))
