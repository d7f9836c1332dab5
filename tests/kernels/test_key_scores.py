from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels.accuracy import require
from mmefficient.kernels.key_scores import key_scores

KEYS = [45, *(pytest.param(n, marks=pytest.mark.gpu) for n in (639, 2881))]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize("given", ["nothing", "bool mask", "float mask", "last", "lse", "all"])
def test_scores(kernel: Any, device: torch.device, keys: int, rows: int, given: str) -> None:
    dtype = torch.float16 if keys > 1000 else torch.float32
    q, k = (torch.randn(3, h, n, 80, device=device, dtype=dtype) for h, n in ((4, rows), (2, keys)))
    options: dict[str, Any] = {}
    if given in ("bool mask", "all"):
        options["mask"] = torch.rand(3, 1, rows, keys, device=device) < 0.7
    if given == "float mask":
        options["mask"] = torch.randn(1, 4, 1, keys, device=device)
    if given in ("last", "all"):
        options["last"] = torch.randint(-1, keys, (3, rows), device=device)
    if given == "lse":
        options["lse"] = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.1).float().logsumexp(-1)
    found = kernel(key_scores, q, k, scale=0.1, **options)
    eager = key_scores(q, k, scale=0.1, **options, impl="reference")
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 0.1
    if given == "float mask":
        logits = logits + options["mask"]
    elif "mask" in options:
        logits = logits.masked_fill(~options["mask"], float("-inf"))
    if "last" in options:
        behind = torch.arange(keys, device=device) > options["last"][:, None, :, None]
        logits = logits.masked_fill(behind, float("-inf"))
    require(found, eager, logits.softmax(-1).nan_to_num(0.0).mean(2))


@pytest.mark.parametrize("heads", ["mean", "sum"])
@pytest.mark.parametrize("rows", ["mean", "sum"])
def test_reductions(device: torch.device, heads: Any, rows: Any) -> None:
    q, k = torch.randn(2, 4, 3, 16, device=device), torch.randn(2, 2, 9, 16, device=device)
    each = key_scores(q, k, scale=0.2, impl="reference")
    found = key_scores(q, k, scale=0.2, rows=rows, heads=heads, impl="reference")
    total = each * (3 if rows == "sum" else 1)
    torch.testing.assert_close(found, total.sum(1) if heads == "sum" else total.mean(1))


def test_mass_is_conserved(device: torch.device) -> None:
    q, k = torch.randn(2, 4, 3, 16, device=device), torch.randn(2, 2, 9, 16, device=device)
    torch.testing.assert_close(key_scores(q, k, scale=0.2, impl="triton").sum(-1), torch.ones(2, 4, device=device))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        key_scores(torch.randn(1, 3, 1, 8), torch.randn(1, 2, 4, 8), scale=1.0)
