"""Cases of the kernel table over stored keys: decoding, key scores, compaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from mmefficient.bench.kernel_problem import Case, D, Problem
from mmefficient.kernels.accuracy import require
from mmefficient.kernels.compact import compact
from mmefficient.kernels.decode_attention import decode_attention
from mmefficient.kernels.decode_attention import kernel as decode_kernel
from mmefficient.kernels.key_scores import key_scores
from mmefficient.kernels.key_scores import reference as scores_reference

DECODE = [(batch, 32, 32, keys) for batch in (1, 8) for keys in (675, 3000)] + [(1, 28, 4, 3000), (8, 28, 4, 675)]


def decode_cases(variants: bool) -> Iterator[Case]:
    for batch, heads, kv_heads, keys in DECODE:
        q = torch.randn(batch, heads, 1, D, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, kv_heads, keys, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)
        name = f"{batch}x{heads}/{kv_heads} {keys}"

        def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Callable[[], torch.Tensor]) -> float:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            eager = ((q @ k.transpose(2, 3)).float() * D**-0.5).softmax(-1).bfloat16() @ v
            return require(run(), eager, exact)

        if variants:
            options = (None, None, 0, None, None, None, D**-0.5)
            parts = (1, 2) if batch * kv_heads > 132 else (4, 6, 8, 11, 16)
            for block, warps, stages in ((64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 2)):
                for n in parts:
                    choice: dict[str, Any] = {"BLOCK_N": block, "num_warps": warps, "num_stages": stages, "PARTS": n}
                    both = partial(decode_kernel.decode_attention, q, k, v, lengths, *options, **choice)
                    variant = partial(first, both)
                    label = f"ours n{block} warps{warps} stages{stages} parts{n}"
                    yield Case("decode", name, label, variant, partial(check, q, k, v, variant))
            continue
        run: Callable[[], Any] = partial(decode_attention, q, k, v, lengths, impl="triton")
        yield Case("decode", name, "ours", run, partial(check, q, k, v, run), facts={"bytes": 2 * k.nbytes})
        peer = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=heads != kv_heads)
        yield Case("decode", name, "SDPA", peer, partial(check, q, k, v, peer))


def score_cases(variants: bool) -> Iterator[Case]:
    if variants:
        return
    p = Problem(1, 32, 32, 2880)
    row = p.q[:, :, -1:].contiguous()

    def check() -> float:
        found = key_scores(row, p.k, scale=D**-0.5, impl="triton")
        eager = scores_reference.key_scores(row, p.k, D**-0.5, None, None, None)
        exact = (row.double() @ p.k.double().transpose(2, 3) * D**-0.5).softmax(-1).sum(2)
        return require(found, eager, exact)

    for what, lse in (("ours", None), ("ours, lse given", torch.zeros(1, 32, 1, device="cuda"))):
        run = partial(key_scores, row, p.k, scale=D**-0.5, lse=lse, impl="triton")
        yield Case("scores", "1x32 2880, 1 row", what, run, check, facts={"bytes": p.k.nbytes})
    keep = torch.arange(0, p.keys, 4, device="cuda", dtype=torch.int32)[None]
    index = keep[0].long()
    pair = lambda: compact(p.k, p.v, keep, impl="triton")  # noqa: E731
    same = lambda: require(pair()[0], p.k[:, :, index], p.k[:, :, index].double())  # noqa: E731
    yield Case("compact", "1x32 2880 -> 1/4", "ours", pair, same, facts={"bytes": p.k.nbytes})
    yield Case("compact", "1x32 2880 -> 1/4", "two index_select", lambda: (p.k[:, :, index], p.v[:, :, index]))


def first(run: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
    return run()[0]
