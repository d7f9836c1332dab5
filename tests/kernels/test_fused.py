"""The small operations of a decoder layer, each as exact as the stock modules' own sequence of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels.accuracy import error, require
from mmefficient.kernels.decode_linear import decode_linear
from mmefficient.kernels.least_heads import least_heads
from mmefficient.kernels.rms_norm import rms_norm
from mmefficient.kernels.rope_store import rope_store
from mmefficient.kernels.swiglu import swiglu

# the interpreter cuts float32 off to bfloat16 instead of rounding it
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def wide(*tensors: Any) -> list[Any]:
    return [
        t.double() if torch.is_tensor(t) else [x.double() for x in t] if isinstance(t, list) else t for t in tensors
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(24,), (24, 8, 8), (40, 40), pytest.param((4096, 512, 512), marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_linear_behind_a_norm(
    kernel: Any, device: torch.device, rows: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also sizes that no block divides, biases, and the gated form."""
    width = 3584 if max(sizes) > 1000 else 200
    x = torch.randn(rows, 1, width, device=device, dtype=dtype)
    weights = [torch.randn(n, width, device=device, dtype=dtype) / 14 for n in sizes]
    norm = torch.rand(width, device=device, dtype=dtype) + 0.5
    residual = torch.randn(rows, 1, sizes[0] if len(sizes) == 2 else sum(sizes), device=device, dtype=dtype)
    given = {"biases": [torch.randn(n, device=device, dtype=dtype) for n in sizes], "gated": len(sizes) == 2}
    given |= {"norm": norm, "residual": residual, "eps": 1e-5}
    found = kernel(decode_linear, x, weights, **given)
    eager = decode_linear(x, weights, **given, impl="reference")
    exact = decode_linear(*wide(x, weights), **dict(zip(given, wide(*given.values()), strict=True)), impl="reference")
    require(found, eager, exact)


def test_linear_alone(kernel: Any, device: torch.device) -> None:
    x, weight = torch.randn(72, 2, device=device)[:, 1], torch.randn(72, 31, device=device).T
    torch.testing.assert_close(kernel(decode_linear, x, [weight]), x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [72, pytest.param(4096, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("added", [False, True])
def test_norm(kernel: Any, device: torch.device, width: int, added: bool, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(2, 5, 2 * width, device=device, dtype=dtype)[..., :width] for _ in range(2))
    weight, given = torch.rand(width, device=device, dtype=dtype), {"residual": residual if added else None}
    found = kernel(rms_norm, x, weight, 1e-6, **given)
    eager = rms_norm(x, weight, 1e-6, **given, impl="reference")
    assert torch.equal(found[1], eager[1])
    require(found[0], eager[0], rms_norm(eager[1].double(), weight.double(), 1e-6, impl="reference")[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(kernel: Any, device: torch.device, dtype: torch.dtype) -> None:
    both = torch.randn(3, 7, 2 * 1100, device=device, dtype=dtype)
    gate, up = both.chunk(2, -1)
    exact = swiglu(gate.double(), up.double(), impl="reference")
    require(kernel(swiglu, gate, up), swiglu(gate, up, impl="reference"), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [80, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_rope(kernel: Any, device: torch.device, dim: int, shared: bool, dtype: torch.dtype) -> None:
    """Views of one product in, slots of their own for each row; nothing else of the buffers is touched."""
    product = torch.randn(3, 5, (9 + 2 * 3) * dim, device=device, dtype=dtype)
    q, k, v = (t.unflatten(-1, (-1, dim)) for t in product.split([9 * dim, 3 * dim, 3 * dim], -1))
    angle = torch.randn(1 if shared else 3, 5, dim // 2, device=device).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    slots = torch.tensor([0, 7, 3], device=device)
    buffers = [torch.randn(3, 12, 3, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2)]
    mine, eager, exact = (
        [b.clone() for b in wide(*buffers)] if n == 2 else [b.clone() for b in buffers] for n in range(3)
    )
    outs = [
        kernel(rope_store, q, k, v, cos, sin, *mine, slots),
        rope_store(q, k, v, cos, sin, *eager, slots, impl="reference"),
        rope_store(*wide(q, k, v, cos, sin), *exact, slots, impl="reference"),
    ]
    require(*outs)
    require(mine[0], eager[0], exact[0], "keys")
    assert torch.equal(mine[1], eager[1])
    written = torch.zeros(3, 12, dtype=torch.bool, device=device)
    for row, slot in enumerate(slots.tolist()):
        written[row, slot : slot + 5] = True
    for new, old in zip(mine, buffers, strict=True):
        assert torch.equal(new.transpose(1, 2)[~written], old.transpose(1, 2)[~written])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [5, pytest.param(32, marks=pytest.mark.gpu)])
def test_least_heads(kernel: Any, device: torch.device, heads: int, dtype: torch.dtype) -> None:
    query = torch.randn(2, 3, heads, 24, device=device, dtype=dtype).transpose(1, 2)
    along, factor = torch.randn(2, heads, 24, device=device), torch.tensor([0.3, 1.0], device=device)
    along[0, 0], along[0, 1] = 0, 0  # a tie
    for count in (0, 2, heads):
        found = kernel(least_heads, query, along, factor, count)
        assert torch.equal(found, least_heads(query, along, factor, count, impl="reference"))
        scores = torch.einsum("bhnd,bhd->bhn", query.float(), along)
        for row in range(3):
            limit = scores[0, :, row].sort().values[:count].amax() if count else float("-inf")
            assert torch.equal(found[0, :, row] == 0.3, scores[0, :, row] <= limit)
        assert (found[1] == 1).all()


def test_refuse_what_does_not_fit() -> None:
    x, weight, cache = torch.randn(2, 8), torch.randn(4, 8), torch.randn(1, 1, 6, 4)
    calls: list[tuple[str, Any]] = [
        ("1 to 16 rows", lambda: decode_linear(torch.randn(17, 8), [weight])),
        ("do not fit x", lambda: decode_linear(x[0], [weight.T])),
        ("two weights", lambda: decode_linear(x[0], [weight], gated=True)),
        ("for each weight", lambda: decode_linear(x[0], [weight], biases=[])),
        ("residual", lambda: decode_linear(x[0], [weight], residual=x[0])),
        ("norm", lambda: decode_linear(x[0], [weight], norm=weight[0][:3])),
        ("do not fit", lambda: rms_norm(x, weight[0][:3], 1e-6)),
        ("differ", lambda: swiglu(x, weight)),
        ("of the heads", lambda: least_heads(cache, cache[:, :, 0], torch.ones(1), 2)),
        ("each other", lambda: rope_store(*(torch.randn(1, 2, h, 4) for h in (2, 1, 2)), x, x, cache, cache, x)),
        ("do not hold", lambda: rope_store(*[torch.randn(1, 2, 1, 4)] * 3, x, x, cache, cache[:, :, :1], x)),
        ("cos", lambda: rope_store(*[torch.randn(1, 2, 1, 4)] * 3, x, x, cache, cache, x)),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
def test_a_captured_chain(device: torch.device) -> None:
    """Kernels that are scheduled before the one they wait for has ended see all that it wrote."""
    weights = [torch.randn(1024, 1024, device=device) / 32 for _ in range(12)]
    norm, source, x = (
        torch.ones(1024, device=device),
        torch.zeros(1, 1024, device=device),
        torch.zeros(1, 1024, device=device),
    )

    def chain(impl: Any) -> torch.Tensor:
        x.copy_(source)
        h = x
        for weight in weights:
            h = decode_linear(h, [weight], norm=norm, residual=x, impl=impl)
            h = rms_norm(swiglu(h, h, impl=impl), norm, 1e-6, residual=h, impl=impl)[0]
        return h

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain("triton")
    for _ in range(50):
        source.normal_()
        graph.replay()
        wanted = chain("reference").double()
        assert error(found, wanted) < 1e-4
