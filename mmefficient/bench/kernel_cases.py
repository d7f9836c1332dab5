"""The cases of the kernel table: ours, the peers, and how each is checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmefficient.bench import decode_cases, step_cases
from mmefficient.bench.kernel_problem import SYSTEM, Case, D, Problem
from mmefficient.kernels.grouped_attention import (
    Layout,
    Pattern,
    causal,
    forward,
    grouped_attention,
    make_layout,
    no_visual_self_attention,
    window,
)

SHAPES = {
    "1x32 576": (1, 32, 32, 576, 0.020),
    "8x32 576": (8, 32, 32, 576, 0.065),
    "1x32 2880": (1, 32, 32, 2880, 0.045),
    "4x32 2880": (4, 32, 32, 2880, 0.14),
    "1x28/4 8192": (1, 28, 4, 8192, 0.13),
    "1x28/4 32768": (1, 28, 4, 32768, 0.50),
}


def dense_peers(table: str, name: str, p: Problem) -> Iterator[Case]:
    """Causal attention without a pattern, as deployed."""
    for what, backend in (("cuDNN causal", SDPBackend.CUDNN_ATTENTION), ("FA2 causal", SDPBackend.FLASH_ATTENTION)):

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=p.heads != p.kv_heads)

        yield Case(table, name, what, run, partial(p.check, causal(), run))


def masked_peers(table: str, name: str, p: Problem, pattern: Pattern) -> Iterator[Case]:
    """The same pairs with FlexAttention and with a bool mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pairs = p.layout(pattern, impl="reference").visible()[:1]

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=pairs)

    last, radius, width = SYSTEM + p.visual, pattern.radius, p.width

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        visual = (i >= SYSTEM) & (i < last)
        if radius < 0:
            return torch.where(visual, i == j, j <= i)
        both = visual & (j >= SYSTEM)
        high = ((i - SYSTEM) // width - (j - SYSTEM) // width).abs() <= radius
        wide = ((i - SYSTEM) % width - (j - SYSTEM) % width).abs() <= radius
        return (j <= i) & (~both | (high & wide))

    blocks = create_block_mask(mask_mod, None, None, p.keys, p.keys, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    flex = lambda: compiled(p.q, p.k, p.v, block_mask=blocks)  # noqa: E731
    yield Case(table, name, "FlexAttention, same pairs", flex, lambda: p.check(pattern, flex))
    yield Case(table, name, "SDPA with a bool mask", sdpa, lambda: p.check(pattern, sdpa))


def ours(table: str, name: str, what: str, p: Problem, pattern: Pattern, facts: dict[str, Any]) -> Case:
    layout = p.layout(pattern)
    run = lambda: grouped_attention(p.q, p.k, p.v, layout, impl="triton")  # noqa: E731
    return Case(table, name, what, run, lambda: p.check(pattern, run), facts={"bytes": p.bytes(), **facts})


def tuned(
    table: str,
    name: str,
    p: Problem,
    pattern: Pattern,
    blocks: tuple[tuple[int, int], ...],
    overrides: list[dict[str, int]],
) -> Iterator[Case]:
    """The same call under other block sizes and settings."""
    for block in blocks:
        layout = p.layout(pattern, blocks=block)
        for choice in overrides:

            def run(layout: Layout = layout, choice: dict[str, Any] = choice) -> torch.Tensor:
                options = (None, None, None, D**-0.5, False, False)
                return forward.grouped_attention(p.q, p.k, p.v, layout, *options, **choice)[0]

            label = " ".join(f"{key.removeprefix('num_')[:5]}{value}" for key, value in choice.items())
            yield Case(table, name, f"ours {block[0]}x{block[1]} {label}", run, partial(p.check, pattern, run))


def choices(*settings: tuple[int, int, int, int]) -> list[dict[str, int]]:
    """Overrides of the kernel from (parts, whether the last query block copies rest rows, warps, stages)."""
    return [dict(zip(("PARTS", "COPIES", "num_warps", "num_stages"), s, strict=True)) for s in settings]


def pattern_cases(variants: bool) -> Iterator[Case]:
    pattern = no_visual_self_attention()
    for name, (batch, heads, kv_heads, visual, reach) in SHAPES.items():
        p = Problem(batch, heads, kv_heads, visual)
        if variants:
            parts = [n for n in (1, 2, 4, 8, 16) if visual >= 256 * n]
            narrow = choices(*((n, copies, 4, 3) for n in parts for copies in (0, 1)), (parts[-1], 1, 4, 2))
            yield from tuned("pattern", name, p, pattern, ((64, 64),), narrow)
            yield from tuned("pattern", name, p, pattern, ((128, 64),), choices(*((n, 1, 8, 3) for n in parts)))
            yield from tuned("pattern", name, p, pattern, ((64, 128),), choices((parts[-1], 1, 4, 2)))
            continue
        yield ours("pattern", name, "ours", p, pattern, {"reach": reach})
        yield from dense_peers("pattern", name, p)
        if visual < 8192:
            yield from masked_peers("pattern", name, p, pattern)


def causal_cases(variants: bool) -> Iterator[Case]:
    p = Problem(1, 32, 32, 2880)
    if variants:
        wide = choices((1, 0, 4, 3), (1, 0, 8, 2), (1, 0, 8, 3), (1, 0, 8, 4))
        yield from tuned("causal", "1x32 2880", p, causal(), ((128, 64),), wide)
        yield from tuned("causal", "1x32 2880", p, causal(), ((128, 128),), choices((1, 0, 8, 2)))
        yield from tuned("causal", "1x32 2880", p, causal(), ((64, 64),), choices((1, 0, 4, 3)))
        return
    flops = 4 * p.heads * D * p.keys * (p.keys + 1) // 2
    bias = torch.randn(1, 32, p.keys, device="cuda")
    maps = torch.rand(3, 1, 32, 2, device="cuda")
    yield ours("causal", "1x32 2880", "ours", p, causal(), {"flops": flops})
    yield from dense_peers("causal", "1x32 2880", p)
    options: dict[str, dict[str, Any]] = {
        "bias": {"bias": bias}, "map": {"logit_map": maps}, "partials": {"partials": True}, "lse": {"lse": True},
    }  # fmt: skip
    for kind, pattern in (("ours", causal()), ("ours, pattern", no_visual_self_attention())):
        made = p.layout(pattern)
        for label, extra in options.items():
            run = partial(grouped_attention, p.q, p.k, p.v, made, impl="triton", **extra)
            yield Case("causal", "1x32 2880", f"{kind} + {label}", run, partial(p.check, pattern, run, **extra))


def backward_cases(variants: bool) -> Iterator[Case]:
    """Gradients of q, k and v; the forward is outside of the time."""
    if variants:
        return
    p = Problem(1, 32, 32, 2880)
    sent = torch.randn_like(p.q)
    q, k, v = (t.detach().requires_grad_() for t in (p.q, p.k, p.v))

    def case(what: str, pattern: Pattern, out: torch.Tensor) -> Case:
        run = lambda: torch.autograd.grad(out, (q, k, v), sent, retain_graph=True)  # noqa: E731
        return Case("backward", "1x32 2880", what, run, lambda: p.check_gradients(pattern, run(), sent), launched_ms)

    for label, pattern in (("ours, causal", causal()), ("ours, no visual self-attention", no_visual_self_attention())):
        out = grouped_attention(q, k, v, p.layout(pattern), impl="triton")
        assert torch.is_tensor(out)
        yield case(label, pattern, out)
    for what, backend in (("cuDNN causal", SDPBackend.CUDNN_ATTENTION), ("FA2 causal", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            yield case(what, causal(), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def window_cases(variants: bool) -> Iterator[Case]:
    p = Problem(1, 32, 32, 96 * 96, width=96)
    pattern = window(2)
    if variants:
        settings = choices((1, 0, 4, 2), (1, 0, 4, 3), (1, 0, 8, 2), (1, 0, 8, 3))
        yield from tuned("window", "96x96 r2", p, pattern, ((64, 64), (128, 64)), settings)
        yield from tuned("window", "96x96 r2", p, pattern, ((128, 32), (64, 32)), settings[1:2])
        return
    yield ours("window", "96x96 r2", "ours", p, pattern, {})
    yield from dense_peers("window", "96x96 r2", p)
    yield from masked_peers("window", "96x96 r2", p, pattern)


def layout_cases(variants: bool) -> Iterator[Case]:
    if variants:
        return
    for visual in (576, 2880, 32768):
        p = Problem(1, 1, 1, visual)
        for label, pattern in (("causal", causal()), ("no visual self-attention", no_visual_self_attention())):
            build = partial(make_layout, p.facts["role"], pattern)
            yield Case("layout", str(visual), f"ours, {label}", build, timer=wall_ms)


def launched_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a call that no CUDA graph can hold."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=15, rep=60, return_mode="median"))


def wall_ms(run: Callable[[], Any]) -> float:
    """Median wall time of a call that waits for the device."""
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 2]


TABLES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "pattern": pattern_cases,
    "causal": causal_cases,
    "backward": backward_cases,
    "decode": decode_cases.decode_cases,
    "scores": decode_cases.score_cases,
    "linear": step_cases.linear_cases,
    "step": step_cases.step_cases,
    "layout": layout_cases,
    "window": window_cases,
}


def every(only: list[str] | None, tune: bool) -> Iterator[Case]:
    """The cases of the chosen tables, made when they are due; the variants that `tune` adds come after all others."""
    for variants in (False, True) if tune else (False,):
        for name, make in TABLES.items():
            if not only or name in only:
                yield from make(variants)
