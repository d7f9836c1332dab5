"""Launches that cost little: on the host, and on a device that can begin a kernel while the one before it ends."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

KEPT = 4096  # launches remembered; beyond them all are forgotten

_launches: dict[tuple[Any, ...], Launch] = {}


@triton.jit
def begin(OVERLAP: tl.constexpr) -> None:
    """What a launched kernel does before it touches memory: wait for the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(OVERLAP: tl.constexpr) -> None:
    """What it does when little is left to do: let the one behind be scheduled.

    Any earlier, and programs of that one would take what places are free, so that some processors get more than others.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels can be scheduled before the one they wait for has ended: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Launch:
    """A Triton kernel with all of its arguments but the tensors.

    Its parameters are tensors, numbers, compile-time constants and OVERLAP, in this order. Triton specialises on types,
    on numbers that are 1 or multiples of 16 and on pointers that are multiples of 16: what a compiled kernel is found
    by here, in place of Triton's own, slower look at every argument. From then on it is given addresses: of a tensor
    Triton's launcher would ask the driver where it lies.

    The kernel has to call `begin(OVERLAP)` first and `release(OVERLAP)` towards its end. `options`: num_warps and
    num_stages.
    """

    def __init__(
        self, kernel: Any, numbers: tuple[int | float, ...], constants: tuple[Any, ...], **options: int
    ) -> None:
        self._kernel, self._values, self._options = kernel, (*numbers, *constants), options
        self._compiled: dict[tuple[Any, ...], tuple[Any, bool]] = {}

    def __call__(self, grid: tuple[int, int, int], *tensors: torch.Tensor) -> None:
        places, mixed = [t.data_ptr() for t in tensors], 0
        for place in places:
            mixed |= place
        apart = [place % 16 for place in places] if mixed % 16 else ()
        key = (*[t.dtype for t in tensors], *[t.get_device() for t in tensors], *apart)
        found = self._compiled.get(key)
        if found is not None:
            found[0][grid](*places, *self._values, found[1])
            return
        overlap = overlaps(tensors[0].device)
        extra = {"launch_pdl": True} if overlap else {}
        compiled = self._kernel[grid](*tensors, *self._values, overlap, **self._options, **extra)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[key] = compiled, overlap


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    **options: int,
) -> None:
    """Run a Triton kernel as a `Launch` that is remembered."""
    key = (kernel, numbers, constants, *options.values())
    found = _launches.get(key)
    if found is None:
        if len(_launches) >= KEPT:
            _launches.clear()
        found = _launches[key] = Launch(kernel, numbers, constants, **options)
    found(grid, *tensors)
