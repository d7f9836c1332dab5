"""Block sizes, parts and stages follow rules that can be checked without a GPU; what cannot run says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels import common
from mmefficient.kernels.compact import compact
from mmefficient.kernels.decode_attention import decode_attention
from mmefficient.kernels.decode_attention import kernel as decode
from mmefficient.kernels.decode_linear import decode_linear
from mmefficient.kernels.group_mix import group_mix
from mmefficient.kernels.grouped_attention import forward as grouped
from mmefficient.kernels.grouped_attention import grouped_attention, make_layout
from mmefficient.kernels.grouped_attention.layout import default_blocks
from mmefficient.kernels.key_scores import key_scores
from mmefficient.kernels.least_heads import least_heads
from mmefficient.kernels.rms_norm import rms_norm
from mmefficient.kernels.rope_store import rope_store
from mmefficient.kernels.swiglu import swiglu

HOPPER, AMPERE = 232_448, 166_912
CPU = torch.device("cpu")


def halved(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Results and masses of one group, x [B, H, N, D], and a mix that halves positive masses."""
    where = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
    move, least = torch.full((1, 1), 0.5, device=x.device), torch.tensor([[1.0, 0.0]], device=x.device)
    return x[None], x[None, ..., 0], where, move, least


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (grouped, decode):
        monkeypatch.setattr(module, "processors", lambda device: 132)


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("heads", "keys", "best"),
    [(32, 675, 4), (8 * 32, 675, 1), (32, 2979, 4), (4 * 32, 2979, 2), (28, 8291, 8)],
)
def test_parts_are_those_that_measured_best(heads: int, keys: int, best: int) -> None:
    """64 rows of a question see all key blocks, 35 of system text one: docs/kernels.md."""
    longest = -(-keys // 64)
    programs = -(-(longest + 1) * heads // longest)
    assert grouped.parts_for(programs, longest, CPU) == best


@pytest.mark.usefixtures("h200")
def test_parts_of_decoding() -> None:
    """At most two programs to a processor, or one, and two key blocks to a part: docs/kernels.md."""
    assert [decode.parts_for(programs, 47, 1, CPU) for programs in (32, 132, 256)] == [8, 2, 1]
    assert [decode.parts_for(programs, 47, 7, CPU) for programs in (4, 32)] == [16, 4]
    assert decode.parts_for(32, 11, 1, CPU) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_settings(dtype: torch.dtype, dim: int) -> None:
    assert default_blocks(dim, dtype) == ((32 if dim > 128 else 64, 32) if dtype == torch.float32 else (64, 64))
    for limit in (HOPPER, AMPERE):
        for rows in (1, 7, 28, 56, 168, 8 * 8 * 4):
            chosen = decode.tuning(rows, dim, dtype, limit)
            padded = max(16, 1 << (dim - 1).bit_length())
            assert decode.need(chosen, padded, dtype.itemsize) <= limit
            assert 16 <= chosen["BLOCK_M"] <= decode.MAX_BLOCK_M


def test_need_covers_what_a_gpu_reported() -> None:
    """8 new rows, 7 heads to a key head and 3 groups in one program of 256 rows, on an H200 with Triton 3.6."""
    wide = {"BLOCK_M": 256, "BLOCK_N": 32, "num_stages": 2}
    assert decode.need(wide, 128, 4) >= 393_728
    assert decode.need({"BLOCK_M": 256, "BLOCK_N": 64, "num_stages": 3}, 128, 2) >= 328_832


def test_stages() -> None:
    tuned = grouped.tuning(64, 128, torch.bfloat16, places=False)
    assert tuned == {"num_warps": 4, "num_stages": 3}
    assert grouped.tuning(64, 128, torch.bfloat16, places=True)["num_stages"] == 2


@pytest.mark.parametrize(("number", "wanted"), [(-1, 1), (0, 1), (1, 1), (2, 2), (11, 8), (16, 16)])
def test_power_below(number: int, wanted: int) -> None:
    assert common.power_below(number) == wanted


def test_gradients_go_to_the_reference(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    layout = make_layout(torch.full((1, 8), 4, device=device), group=torch.ones(1, 8, device=device), impl="triton")
    q = torch.randn(1, 2, 8, 32, device=device, requires_grad=True)
    zero, cache = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, 8, 2, 32, device=device)
    calls: list[Any] = [
        lambda impl: grouped_attention(q, q, q, layout, partials=True, impl=impl)[0],
        lambda impl: decode_attention(q, q, q, torch.full((1,), 8, device=device), impl=impl),
        lambda impl: key_scores(q, q, scale=1.0, impl=impl),
        lambda impl: compact(q, q, torch.tensor([[1, 3]], device=device), impl=impl)[0],
        lambda impl: decode_linear(q[0, 0, 0], [q[0, 0]], impl=impl),
        lambda impl: rms_norm(q, q.detach()[0, 0, 0], 1e-6, impl=impl)[0],
        lambda impl: rope_store(q, q, q, *[q.detach()[:, :, 0]] * 2, cache.clone(), cache.clone(), zero, impl=impl),
        lambda impl: swiglu(q, q, impl=impl),
        lambda impl: group_mix(*halved(q), dtype=q.dtype, impl=impl),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="no backward"):
            call("triton")
        with caplog.at_level("DEBUG", "mmefficient"):
            assert call("auto").requires_grad
        assert "reference instead of the kernel" in caplog.text
        with torch.no_grad():
            assert not call("triton").requires_grad


def test_operators(device: torch.device) -> None:
    """Shapes and schemas that torch.compile sees are those of the kernels."""
    from mmefficient.kernels.compact.op import compact_op
    from mmefficient.kernels.decode_attention.op import decode_op
    from mmefficient.kernels.decode_linear.op import linear_op
    from mmefficient.kernels.group_mix.op import mix_op
    from mmefficient.kernels.grouped_attention.op import grouped_op, pack
    from mmefficient.kernels.key_scores.op import key_scores_op
    from mmefficient.kernels.least_heads.op import least_op
    from mmefficient.kernels.rms_norm.op import norm_op
    from mmefficient.kernels.rope_store.op import rope_op
    from mmefficient.kernels.swiglu.op import swiglu_op

    q, k = torch.randn(2, 4, 1, 32, device=device), torch.randn(2, 2, 20, 32, device=device)
    layout = make_layout(torch.full((2, 20), 4, device=device), queries=1, blocks=(16, 16), impl="triton")
    lengths, keep = torch.tensor([20, 7], device=device), torch.tensor([[[1, 3]], [[-1, 0]]], device=device)
    angles = [torch.randn(1, 4, 32, device=device) for _ in range(2)]
    group = torch.zeros(2, 20, dtype=torch.int32, device=device)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (grouped_op, (q, k, k, *pack(layout), None, None, None, 0.2, False, True)),
        (grouped_op, (q, k, k, *pack(layout), None, None, None, 0.2, False, False)),
        (decode_op, (q, k, k, lengths, None, None, 0, None, None, None, 0.2)),
        (decode_op, (q, k, k, lengths, None, group, 2, None, None, None, 0.2)),
        (key_scores_op, (q, k, 0.2, None, None, None)),
        (compact_op, (k, k, keep)),
        (linear_op, (q[0, 0], [k[0, 0], k[1, 0]], [None, lengths.float().repeat(10)], k[0, 0, 0], 1e-6, True, None)),
        (linear_op, (q[0, 0], [k[0, 0], k[1, 0][:3]], [None, None], None, 1e-6, False, None)),
        (norm_op, (k, k[0, 0, 0], 1e-6, k)),
        (norm_op, (k, k[0, 0, 0], 1e-6, None)),
        (rope_op, (q, *[k[:, :, :4].transpose(1, 2)] * 2, *angles, k.clone(), k.clone(), lengths - 7)),
        (swiglu_op, (k, k)),
        (mix_op, (*halved(k), torch.float16)),
        (least_op, (k, k[:, :, 0], lengths.float(), 1)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_graph_break(device: torch.device) -> None:
    q, k = torch.randn(2, 4, 1, 32, device=device), torch.randn(2, 2, 20, 32, device=device)
    lengths, keep = torch.tensor([20, 7], device=device), torch.tensor([[1, 3], [-1, 0]], device=device)
    angles = [torch.randn(1, 4, 32, device=device) for _ in range(2)]

    def turned(k: torch.Tensor, impl: Any) -> torch.Tensor:
        keys, values, new = k.clone(), k.clone(), k[:, :, :4].transpose(1, 2)
        return rope_store(q, new, new, *angles, keys, values, lengths - 7, impl=impl).sum() + keys + 2 * values

    calls: list[Any] = [
        lambda k, impl: decode_attention(q, k + 1, k, lengths, impl=impl),
        lambda k, impl: key_scores(q, k + 1, scale=0.2, impl=impl),
        lambda k, impl: compact(k + 1, k, keep, impl=impl)[0],
        lambda k, impl: decode_linear(q[0, 0] + 1, [k[0, 0]], norm=k[0, 0, 0], impl=impl),
        lambda k, impl: rms_norm(k + 1, k[0, 0, 0], 1e-6, residual=k, impl=impl)[1],
        turned,
        lambda k, impl: swiglu(k + 1, k, impl=impl),
        lambda k, impl: group_mix(*halved(k), dtype=k.dtype, impl=impl),
        lambda k, impl: least_heads(k + 1, k[:, :, 0], lengths.float(), 1, impl=impl),
    ]
    for call in calls:
        whole = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(k, "triton"), call(k, "reference"), atol=1e-5, rtol=1e-5)


def test_decode_says_what_does_not_fit(device: torch.device) -> None:
    q, k, n = torch.randn(1, 4, 9, 32), torch.randn(1, 2, 20, 32), torch.tensor([20])
    with pytest.raises(ValueError, match="1 to 8"):
        decode_attention(q, k, k, n)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[:, :3, :1], k, k, n)
    with pytest.raises(ValueError, match="give group"):
        decode_attention(q[:, :, :1], k, k, n, partials=True)
