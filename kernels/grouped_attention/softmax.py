"""The running softmax of `grouped_attention`: logits, one key block after the other, and parts of the keys merged."""

from __future__ import annotations

import triton
import triton.language as tl

from mmefficient.kernels.grouped_attention.schedule import pairs


@triton.jit
def mapped(s, shaping, of, scale, MAP: tl.constexpr):
    """Logits after scale and map by group; without a map they are left unscaled, see `unit`.

    `shaping`: this head's biases, its a, and the strides to b and c and to the next group; `of`: the groups of the
    keys, or the one that they are all of.
    """
    _bias, factors, map_f, map_g = shaping
    if MAP:
        s = s * scale
        a = tl.load(factors + of * map_g).to(tl.float32)
        m = tl.load(factors + map_f + of * map_g).to(tl.float32)
        c = tl.load(factors + 2 * map_f + of * map_g).to(tl.float32)
        s = a * s + (m * tl.abs(s) + c)
    return s


@triton.jit
def in_units(bias, scale, MAP: tl.constexpr):
    """A bias in units of the logits of `mapped`."""
    return bias.to(tl.float32) if MAP else bias.to(tl.float32) * (1.0 / scale)


@triton.jit
def biases(shaping, entry, keys, scale, BLOCK_N: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr,
           PADDED: tl.constexpr):  # fmt: skip
    """Those of the key block of a list's `entry`, zeros if there are none; PADDED: rows reach to the end of a block."""
    found = tl.zeros([BLOCK_N], tl.float32)
    if BIAS:
        key = (entry & 0xFFFFFF) * BLOCK_N + tl.arange(0, BLOCK_N)
        found = in_units(tl.load(shaping[0] + (key if PADDED else tl.minimum(key, keys - 1))), scale, MAP)
    return found


@triton.jit
def unit(scale, MAP: tl.constexpr):
    """What turns the logits of `mapped` into exponents of two, inside the multiply-add that takes the maximum off."""
    return 1.4426950408889634 if MAP else scale * 1.4426950408889634


@triton.jit
def step(
    x, top, total, acc, facts, own, n, entry, shift, some, k, v, k_n, v_n, rules, known, keys, shaping, scale, wanted,
    copied, copies, out, o_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    MAP: tl.constexpr, BIAS: tl.constexpr, COPIES: tl.constexpr, PLACES: tl.constexpr, SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key block of a list's `entry`, with biases `shift`, in the running softmax; `some`: not all pairs exist."""
    d = tl.arange(0, BLOCK_D)
    key = (entry & 0xFFFFFF) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = key < keys
    groups = known[5]
    if COPIES:
        to = tl.load(copied + key, mask=key < copies, other=-1)
    place = tl.minimum(key, keys - 1).to(tl.int64)  # cheaper than a mask; what lies behind the end is no pair
    at_k = k + place[None] * k_n + d[:, None]
    at_v = v + place[:, None] * v_n + d[None]
    if D < BLOCK_D:
        y = tl.load(at_k, mask=(d < D)[:, None], other=0.0)
        z = tl.load(at_v, mask=(d < D)[None], other=0.0)
    else:
        y = tl.load(at_k)
        z = tl.load(at_v)
    logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BIAS and not MAP:  # to begin with it costs less than to add it
        logit += shift[None]
    logit = tl.dot(x, y, logit, input_precision=PRECISION)
    if MAP:
        logit *= scale
        alone = entry >> 26
        if alone > 0:  # numbers, which are cheaper than a vector of them
            logit = mapped(logit, shaping, alone - 1, 1.0, MAP)
        else:
            of = tl.load(groups + key, mask=real, other=0)
            logit = mapped(logit, shaping, of[None], 1.0, MAP)
        if BIAS:
            logit += shift[None]
    if GROUPS > 1:
        if some:
            mine = tl.load(groups + key, mask=real, other=-1) == wanted
            logit = tl.where(mine[None], logit, float("-inf"))
        some = some & ((entry >> 24 & 1) == 0)
    if some:
        ok = pairs(facts, own, key, n, rules, known, keys, PLACES, SEGMENTS, MASKED)
        logit = tl.where(ok, logit, float("-inf"))
    new = tl.maximum(top, tl.max(logit, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    power = unit(scale, MAP)
    weight = tl.exp2(logit * power - (safe * power)[:, None])
    fade = tl.exp2((top - safe) * power)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(z.dtype), z, acc * fade[:, None], input_precision=PRECISION)
    if COPIES:
        tl.store(out + to[:, None].to(tl.int64) * o_n + d[None], z, mask=(to >= 0)[:, None] & (d < D)[None])
    return new, total, acc


@triton.jit
def merged(
    acc, level, scratch, arrived, task, part, parts, tasks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Whether all `parts` (room is for PARTS) have now finished this task, and if so their merge."""
    d = tl.arange(0, BLOCK_D)
    levels = scratch + tasks * PARTS * BLOCK_M * D
    spot = (task * PARTS + part) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(levels + spot, level)
    tl.store(scratch + spot[:, None] * D + d[None], acc, mask=(d < D)[None])
    tl.debug_barrier()  # every thread has stored before one of them says so
    last = tl.atomic_add(arrived + task, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(arrived + task, 0)
        # past the L1 cache, which is not coherent: other processors wrote this; nothing waits for another load
        m = tl.arange(0, BLOCK_M)
        spot = task * PARTS * BLOCK_M + m
        top = tl.load(levels + spot, cache_modifier=".cg")
        for other in tl.static_range(1, PARTS):
            of = levels + spot + other * BLOCK_M
            here = tl.load(of, mask=m * 0 + other < parts, other=float("-inf"), cache_modifier=".cg")
            top = tl.maximum(top, here)
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for other in tl.range(0, PARTS, loop_unroll_factor=4 if PARTS <= 4 else 2):  # more take too many registers
            there = m * 0 + other < parts
            at = spot + other * BLOCK_M
            weight = tl.exp2(tl.load(levels + at, mask=there, other=float("-inf"), cache_modifier=".cg") - safe)
            inside = there[:, None] & (d < D)[None]
            value = tl.load(scratch + at[:, None] * D + d[None], mask=inside, other=0.0, cache_modifier=".cg")
            acc += value * weight[:, None]
            total += weight
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        level = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    return last, acc, level
