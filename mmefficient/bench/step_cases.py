"""Cases of the kernel table for one decoding step at the geometry of a 7B model: its products, and whole layers.

Weights are more than the L2 cache holds: each product runs over several sets of them, and the layers are several.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from mmefficient.bench.kernel_problem import Case, D
from mmefficient.kernels.accuracy import require
from mmefficient.kernels.decode_attention import decode_attention
from mmefficient.kernels.decode_linear import decode_linear
from mmefficient.kernels.decode_linear import reference as linear_reference
from mmefficient.kernels.rms_norm import reference as norm_reference
from mmefficient.kernels.rope_store import reference as rope_reference
from mmefficient.kernels.rope_store import rope_store

WIDTH, INNER, HEADS, LAYERS, STORED, EPS = 4096, 11008, 32, 8, 675, 1e-5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def linear_cases(variants: bool) -> Iterator[Case]:
    if variants:
        return
    norm = {"norm": random(WIDTH).abs() + 0.5, "eps": EPS}
    shapes: list[tuple[str, int, tuple[int, ...], dict[str, Any]]] = [
        ("qkv", WIDTH, (WIDTH,) * 3, norm),
        ("out", WIDTH, (WIDTH,), {"residual": random(1, WIDTH)}),
        ("gate-up", WIDTH, (INNER,) * 2, {**norm, "gated": True}),
        ("down", INNER, (WIDTH,), {"residual": random(1, WIDTH)}),
    ]
    for name, width, sizes, options in shapes:
        x, sets = random(1, width), [[random(n, width) / 64 for n in sizes] for _ in range(8 // len(sizes))]
        facts = {"bytes": sum(w.nbytes for weights in sets for w in weights), "calls": len(sets)}
        ours = partial(each, partial(decode_linear, impl="triton", **options), x, sets)
        yield Case("linear", name, "ours", ours, partial(check_linear, x, sets[0], options), facts=facts)
        yield Case("linear", name, "cuBLAS, products alone", partial(each, products, x, sets), facts=facts)


def each(run: Any, x: torch.Tensor, sets: list[list[torch.Tensor]]) -> None:
    for weights in sets:
        run(x, weights)


def products(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [F.linear(x, w) for w in weights]


def check_linear(x: torch.Tensor, weights: list[torch.Tensor], options: dict[str, Any]) -> float:
    def by(dtype: torch.dtype) -> torch.Tensor:
        given: dict[str, Any] = {key: v.to(dtype) if torch.is_tensor(v) else v for key, v in options.items()}
        wide = [w.to(dtype) for w in weights]
        return decode_linear(x.to(dtype), wide, **given, impl="reference")

    return require(decode_linear(x, weights, **options, impl="triton"), by(torch.bfloat16), by(torch.float64))


def step_cases(variants: bool) -> Iterator[Case]:
    if variants:
        return
    layers = [random_layer() for _ in range(LAYERS)]
    h, angle = random(1, 1, WIDTH), torch.randn(1, 1, D // 2, device="cuda").repeat(1, 1, 2)
    slots = torch.full((1,), STORED - 1, device="cuda")
    given = (angle.cos().bfloat16(), angle.sin().bfloat16(), slots)
    name = f"{LAYERS} layers, {STORED}"
    moved = sum(t.nbytes for layer in layers for t in layer)
    compiled = torch.compile(stock_layer, fullgraph=True, dynamic=False)
    for what, run in (("ours", our_layer), ("torch.compile", compiled), ("stock modules' operations", stock_layer)):
        walk = partial(through, run, layers, h, *given)
        yield Case("step", name, what, walk, partial(check_step, walk, layers, h, *given), facts={"bytes": moved})


class Layer(NamedTuple):
    """A decoder layer's weights, and its cache with one free slot."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def random_layer() -> Layer:
    square, inner = ((WIDTH, WIDTH),) * 4, ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
    products = [random(*shape) / shape[1] ** 0.5 for shape in (*square, *inner)]
    norms = [random(WIDTH).abs() for _ in range(2)]
    return Layer._make([*products, *norms, *(random(1, HEADS, STORED, D) for _ in range(2))])


def through(run: Any, layers: list[Layer], h: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        h = run(h, layer, *given)
    return h


def our_layer(h: torch.Tensor, w: Layer, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Six launches."""
    product = decode_linear(h, [w.q, w.k, w.v], norm=w.first, eps=EPS, impl="triton")
    q, k, v = (t.unflatten(-1, (-1, D)) for t in product.chunk(3, -1))
    q = rope_store(q, k, v, cos, sin, w.keys, w.values, slots, impl="triton")
    out = decode_attention(q, w.keys, w.values, slots + 1, impl="triton")
    assert torch.is_tensor(out)
    h = decode_linear(out.view(h.shape), [w.o], residual=h, impl="triton")
    inner = decode_linear(h, [w.gate, w.up], norm=w.second, eps=EPS, gated=True, impl="triton")
    return decode_linear(inner, [w.down], residual=h, impl="triton")


def stock_layer(h: torch.Tensor, w: Layer, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The operations of a stock decoder layer, in any dtype."""
    x = norm_reference.rms_norm(h, w.first, EPS, None)[0]
    q, k, v = (F.linear(x, weight).unflatten(-1, (-1, D)) for weight in (w.q, w.k, w.v))
    w.keys.index_copy_(2, slots, rope_reference.rotate(k, cos, sin).transpose(1, 2))
    w.values.index_copy_(2, slots, v.transpose(1, 2))
    q = rope_reference.rotate(q, cos, sin).transpose(1, 2)
    h = linear_reference.decode_linear(
        F.scaled_dot_product_attention(q, w.keys, w.values).transpose(1, 2).flatten(2),
        [w.o],
        [None],
        None,
        EPS,
        False,
        h,
    )
    x = linear_reference.decode_linear(h, [w.gate, w.up], [None, None], w.second, EPS, True, None)
    return linear_reference.decode_linear(x, [w.down], [None], None, EPS, False, h)


def check_step(
    run: Any, layers: list[Layer], h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor
) -> float:
    eager = through(stock_layer, layers, h, cos, sin, slots)
    exact = h.double()
    for layer in layers:
        wide = Layer._make(t.to(torch.float64, copy=True) for t in layer)
        exact = stock_layer(exact, wide, cos.double(), sin.double(), slots)
    return require(run(), eager, exact)
