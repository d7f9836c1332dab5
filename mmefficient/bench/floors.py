"""The least time the hardware allows: what this device multiplies and moves per second, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device: FLOP/s of a large matrix product, and bytes/s (read plus written) of a copy."""

    flops: float
    bandwidth: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """Milliseconds that `flops` operations and `moved` bytes take at least."""
        return max(flops / self.flops, moved / self.bandwidth) * 1e3


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings with random data (zeros run faster than real data on some chips); about two seconds."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn((2**30 if cuda else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    multiply = median_ms(lambda: a @ b, device, 10)
    copy = median_ms(lambda: target.copy_(source), device, 10)
    return Ceilings(2 * side**3 / multiply * 1e3, 2 * source.nbytes / copy * 1e3)


def median_ms(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of `work` in ms after three warm-up calls, with the device synchronised around each call."""
    times = []
    for index in range(repeats + 3):
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        if index >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
