from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels.grouped_attention import (
    Pattern,
    causal,
    forward,
    grouped_attention,
    image_sees_question,
    make_layout,
    no_visual_self_attention,
    pages_apart,
    window,
)
from tests.kernels.prompts import compare, facts, layout_for, options, qkv

PATTERNS: dict[str, Pattern] = {
    "causal": causal(),
    "self": no_visual_self_attention(),
    "nothing": no_visual_self_attention("nothing"),
    "text": no_visual_self_attention("text"),
    "window": window(1),
    "bidirectional": window(1, bidirectional=True),
    "question": image_sees_question(),
    "pages": pages_apart(),
    "pages and question": pages_apart() & image_sees_question(),
}
SMALL = (32, 32)
REAL = [pytest.param(n, marks=pytest.mark.gpu) for n in (63, 577, 639, 2881)]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter cannot multiply it


def blocks(length: int) -> dict[str, Any]:
    """Small prompts get small blocks, so that there are several."""
    return {"blocks": SMALL} if length < 500 else {}


@pytest.mark.parametrize("length", [65, *REAL])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(kernel: Any, device: torch.device, pattern: str, length: int) -> None:
    layout = layout_for(PATTERNS[pattern], length, device, **blocks(length))
    compare(kernel, layout, qkv(layout, 2, 1, 32, torch.float32 if length < 100 else torch.bfloat16))


@pytest.mark.parametrize("length", [65, *REAL])
@pytest.mark.parametrize("partials", [False, True])
@pytest.mark.parametrize("pattern", ["self", "window"])
def test_options(kernel: Any, device: torch.device, pattern: str, partials: bool, length: int) -> None:
    layout = layout_for(PATTERNS[pattern], length, device, **blocks(length))
    tensors = qkv(layout, 7, 1, 80, torch.float32 if length < 1000 else torch.float16)
    compare(kernel, layout, tensors, **options(layout, 7), partials=partials)


@pytest.mark.parametrize("length", [65, *REAL])
@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("pattern", ["causal", "self"])
def test_two_groups(kernel: Any, device: torch.device, pattern: str, image: int, length: int) -> None:
    """A prompt without an image has no key of the first, or of the second."""
    given = facts(length, device)
    group = torch.where(given["role"] == 2, image, 1 - image)
    layout = layout_for(PATTERNS[pattern], length, device, group=group, groups=2, **blocks(length))
    tensors = qkv(layout, 2, 1, 32, torch.float32 if length < 100 else torch.bfloat16)
    compare(kernel, layout, tensors, partials=True)
    compare(kernel, layout, tensors, partials=True, bias=options(layout, 2)["bias"])
    compare(kernel, layout, tensors, partials=True, **options(layout, 2))


@pytest.mark.parametrize(("length", "pads"), [(60, False), (150, True)])
def test_biases(kernel: Any, device: torch.device, length: int, pads: bool) -> None:
    """Read where they lie, or, if many query blocks read them, from a copy with rows that reach to a block's end."""
    layout = make_layout(**facts(length, device, batch=1), blocks=(16, 16), impl="triton")
    assert layout.schedule is not None
    assert forward.pads(layout.schedule) is pads
    tensors, whole = qkv(layout, 2, 1, 32, torch.float32), torch.randn(1, 2, length, device=device)
    whole[0, 1, 5] = float("-inf")
    for bias in (whole, whole[:, :1], whole[..., :1], whole.transpose(1, 2).contiguous().transpose(1, 2)):
        compare(kernel, layout, tensors, bias=bias)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize("length", [33, pytest.param(639, marks=pytest.mark.gpu)])
def test_head_size(kernel: Any, device: torch.device, dim: int, dtype: torch.dtype, length: int) -> None:
    layout = layout_for(window(1), length, device, **blocks(length), head_dim=dim, dtype=dtype)
    compare(kernel, layout, qkv(layout, 2, 1, dim, dtype))


@pytest.mark.parametrize("length", [1, 2, 31, 32])
def test_short(kernel: Any, device: torch.device, length: int) -> None:
    layout = layout_for(no_visual_self_attention(), length, device)
    compare(kernel, layout, qkv(layout, 2, 2, 32, torch.float32))


@pytest.mark.parametrize("length", [65, *REAL])
def test_two_patterns_by_head(kernel: Any, device: torch.device, length: int) -> None:
    heads = torch.tensor([0, 1, 1, 0], device=device)
    pair = [causal(), no_visual_self_attention("nothing")]
    layout = layout_for(pair, length, device, head_pattern=heads, **blocks(length))
    compare(kernel, layout, qkv(layout, 4, 2, 64, torch.float32), partials=True)


def test_rows_of_text_alone(kernel: Any, device: torch.device) -> None:
    """Visual tokens may be keys and values without rows of their own."""
    given = facts(65, device)
    rows = [(row != 2).nonzero()[:, 0] for row in given["role"]]
    longest = max(len(r) for r in rows)
    own = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0), value=-1) for r in rows])
    layout = make_layout(**given, queries=own, blocks=SMALL, impl="triton")
    compare(kernel, layout, qkv(layout, 4, 2, 32, torch.float32))


def test_cached_prefix(kernel: Any, device: torch.device) -> None:
    layout = layout_for(no_visual_self_attention(), 65, device, queries=20, blocks=SMALL)
    compare(kernel, layout, qkv(layout, 4, 2, 32, torch.float32))


def test_packed_sequences(kernel: Any, device: torch.device) -> None:
    lengths = [17, 1, 30]
    role = torch.full((1, sum(lengths)), 4, device=device)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    layout = make_layout(role, cu_seqlens=ends, blocks=(16, 16), impl="triton")
    tensors = qkv(layout, 2, 1, 32, torch.float32)
    found = kernel(grouped_attention, *tensors, layout)
    parts = [t.split(lengths, 2) for t in tensors]
    for i, out in enumerate(found.split(lengths, 2)):
        q, k, v = (part[i] for part in parts)
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)


def test_any_mask(kernel: Any, device: torch.device) -> None:
    mask = torch.rand(3, 65, 65, device=device) < 0.3
    layout = layout_for(causal(), 65, device, mask=mask, blocks=SMALL)
    assert torch.equal(layout.visible(), layout_for(causal(), 65, device, blocks=SMALL).visible() & mask[:, None])
    compare(kernel, layout, qkv(layout, 4, 2, 32, torch.float32))


@pytest.mark.parametrize("length", [65, *REAL])
@pytest.mark.parametrize("pattern", ["causal", "self", "window"])
def test_nothing_read_back(kernel: Any, device: torch.device, pattern: str, length: int) -> None:
    layout = layout_for(PATTERNS[pattern], length, device, exact=False, **blocks(length))
    tensors = qkv(layout, 4, 2, 32, torch.float32)
    compare(kernel, layout, tensors)
    compare(kernel, layout, tensors, **options(layout, 4), partials=True)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("partials", [False, True])
def test_split_keys(device: torch.device, parts: int, partials: bool) -> None:
    layout = layout_for(no_visual_self_attention(), 47, device, blocks=(16, 16))
    q, k, v = qkv(layout, 1, 1, 32, torch.float32)
    found = forward.grouped_attention(q, k, v, layout, None, None, None, 0.2, partials, True, PARTS=parts)
    wanted = grouped_attention(q, k, v, layout, scale=0.2, partials=partials, lse=True, impl="reference")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [33, pytest.param(2881, marks=pytest.mark.gpu)])
def test_later_calls(device: torch.device, length: int) -> None:
    """Calls after the first go a shorter way: other tensors, another memory order, another alignment, an option."""
    layout = layout_for(no_visual_self_attention(), length, device, **blocks(length))
    for change in range(5):
        q, k, v = qkv(layout, 2, 2, 32, torch.float16)
        if change == 2:
            q, k = q.contiguous(), k.transpose(1, 2).contiguous().transpose(1, 2)
        if change == 3:
            k = torch.nn.functional.pad(k, (1, 1))[..., 1:-1]
        given: dict[str, Any] = {"head_gain": torch.rand(3, 2, 1, device=device)} if change == 4 else {}
        compare(grouped_attention_in_triton, layout, (q, k, v), **given)


def grouped_attention_in_triton(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return operation(*args, **kwargs, impl="triton")


@pytest.mark.gpu
def test_replays(device: torch.device) -> None:
    """Captured calls follow their inputs, also where parts of the keys are merged."""
    layout = layout_for(no_visual_self_attention(), 2881, device)
    q, k, v = qkv(layout, 2, 2, 64, torch.bfloat16)
    wanted = grouped_attention(q, k, v, layout, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [grouped_attention(q, k, v, layout, impl="triton") for _ in range(2)]
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(out, wanted) for out in found)
        v.neg_()
        wanted = -wanted


def test_nothing_is_silent(device: torch.device) -> None:
    layout = make_layout(torch.full((1, 8), 4, device=device), impl="reference")
    q = torch.randn(1, 2, 8, 32, device=device)
    with pytest.raises(ValueError, match="made for the reference"):
        grouped_attention(q, q, q, layout, impl="triton")
    with pytest.raises(ValueError, match="key groups"):
        grouped_attention(q, q, q, layout, partials=True)
    with pytest.raises(ValueError, match="layout is for"):
        grouped_attention(q, q[:, :, :5], q[:, :, :5], layout)
    with pytest.raises(ValueError, match="page, row and col"):
        make_layout(layout.role, window(1))
    with pytest.raises(ValueError, match="positive"):
        grouped_attention(q, q, q, layout, scale=0.0)
    with pytest.raises(ValueError, match="different distances"):
        window(1) & Pattern(near=(0, 0, 4, 0, 4), radius=2) & Pattern(near=(0, 0, 2, 0, 0), radius=0)


def test_compiles_whole(device: torch.device) -> None:
    layout = layout_for(no_visual_self_attention(), 33, device, blocks=SMALL)
    q, k, v = qkv(layout, 2, 1, 32, torch.float32)
    whole = torch.compile(lambda q: grouped_attention(2 * q, k, v, layout, impl="triton") + 1, fullgraph=True)
    torch.testing.assert_close(whole(q), grouped_attention(2 * q, k, v, layout, impl="reference") + 1)
