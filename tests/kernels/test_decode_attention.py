from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels.accuracy import require
from mmefficient.kernels.decode_attention import decode_attention, reference
from mmefficient.kernels.decode_attention import kernel as decode

ROOMS = [40, *(pytest.param(n, marks=pytest.mark.gpu) for n in (675, 3000))]


def cache(room: int, heads: int, kv_heads: int, dim: int, new: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Three rows of different lengths; behind them the buffers hold NaN."""
    dtype = torch.float16 if room > 1000 else torch.float32
    lengths = torch.tensor([room - 3, room // 2 + 1, new + 1], dtype=torch.int32, device=device)
    q = torch.randn(3, heads, new, dim, device=device, dtype=dtype)
    k, v = (torch.randn(3, kv_heads, room, dim, device=device, dtype=dtype) for _ in range(2))
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = float("nan")
    return q, k, v, lengths


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("new", [1, 3, 8])
@pytest.mark.parametrize("heads", [7, 1])
@pytest.mark.parametrize("options", ["none", "starts", "all", "partials"])
def test_decode(kernel: Any, device: torch.device, room: int, new: int, heads: int, options: str) -> None:
    """Seven heads to a key head, and one, whose single row has a merge of its own."""
    q, k, v, lengths = cache(room, heads, 1, 80, new, device)
    given: dict[str, Any] = {}
    if options != "none":
        given["starts"] = torch.tensor([0, 3, 1], dtype=torch.int32, device=device)
    if options in ("all", "partials"):
        given |= {
            "group": torch.randint(0, 3, (3, room), device=device, dtype=torch.int32),
            "groups": 3,
            "bias": torch.randn(1, heads, room, device=device),
            "logit_map": torch.randn(3, 1, heads, 3, device=device),
            "head_gain": torch.rand(3, heads, 1, device=device),
            "partials": options == "partials",
        }
    found = kernel(decode_attention, q, k, v, lengths, **given, lse=True)
    eager = decode_attention(q, k, v, lengths, **given, lse=True, impl="reference")
    wide = (t.double() for t in (q, k, v))
    exact = decode_attention(*wide, lengths, **given, lse=True, impl="reference")
    require(found[0], eager[0], exact[0])
    seen = exact[1].isfinite()
    assert torch.equal(found[1].isfinite(), seen)
    require(found[1][seen], eager[1][seen], exact[1][seen], "log-sum-exp")


def test_many_heads(kernel: Any, device: torch.device) -> None:
    q, k, v, lengths = cache(40, 6, 3, 32, 1, device)
    wanted = decode_attention(q, k, v, lengths, impl="reference")
    torch.testing.assert_close(kernel(decode_attention, q, k, v, lengths), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_change_nothing(device: torch.device, heads: int, parts: int) -> None:
    """The last program of a head merges its parts, also those without a key, and leaves its counter as it was."""
    q, k, v, lengths = cache(40, heads, 3, 32, 1, device)
    given = (q, k, v, lengths, None, None, 0, None, None, None, 0.2)
    wanted = reference.decode_attention(*given)
    for _ in range(2):
        found = decode.decode_attention(*given, PARTS=parts, BLOCK_N=16)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_replays_with_other_lengths(device: torch.device) -> None:
    """A captured call follows the lengths on the device."""
    q, k, v, lengths = (t.nan_to_num(1.0) for t in cache(675, 32, 32, 128, 1, device))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode_attention(q, k, v, lengths, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(q, k, v, lengths, impl="triton")
    for change in (0, 2, 1):
        lengths += change
        graph.replay()
        wanted = decode_attention(q, k, v, lengths, impl="reference")
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
