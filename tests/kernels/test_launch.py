"""A compiled kernel is used again only where Triton would have compiled the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.kernels import launch as module
from mmefficient.kernels.arrivals import counters
from mmefficient.kernels.launch import launch


class Kernel:
    """Stands for a Triton kernel: counts how often it is compiled and run, and keeps the last arguments."""

    def __init__(self) -> None:
        self.compiled, self.run = 0, 0
        self.arguments: tuple[Any, ...] = ()

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def first(*arguments: Any, **options: int) -> Any:
            self.compiled += 1
            return Compiled(self)

        return first


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def again(*arguments: Any) -> None:
            self.kernel.run += 1
            self.kernel.arguments = arguments

        return again


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_launches", {})


def test_what_counts_as_the_same_call() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    for tensor, number, constant, warps in [
        (x, 3, True, 4),
        (x[1:], 3, True, 4),  # another alignment
        (x.half(), 3, True, 4),
        (x, 16, True, 4),
        (x, 3, False, 4),
        (x, 3, True, 8),
    ]:
        before = kernel.compiled, kernel.run
        for _ in range(2):
            launch(kernel, (1, 1, 1), (tensor,), (number,), (constant,), num_warps=warps)
        assert (kernel.compiled, kernel.run) == (before[0] + 1, before[1] + 1)
        assert kernel.arguments == (tensor.data_ptr(), number, constant, False)
    launch(kernel, (9, 1, 1), (torch.zeros(64),), (3,), (True,), num_warps=4)
    assert kernel.compiled == 6


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    kernel, x = Kernel(), torch.zeros(4)
    for number in range(8):
        launch(kernel, (1, 1, 1), (x,), (number,), ())
        assert len(module._launches) <= 3


@pytest.mark.gpu
def test_captured_launches_have_counters_of_their_own() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    eager = counters(5, device)
    assert counters(7, device).data_ptr() == eager.data_ptr()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one, two = counters(5, device), counters(5, device)
    places = {t.data_ptr() for t in (eager, one, two)}
    assert len(places) == 3
    assert all(place % 16 == 0 for place in places)
