"""Launches that cost little: on the host, and on a device that can begin a kernel while the one before it ends."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

KEPT = 4096  # calls remembered; beyond them all are forgotten

_compiled: dict[tuple[Any, ...], Any] = {}


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


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    **options: int,
) -> None:
    """Run a Triton kernel whose parameters are tensors, numbers, compile-time constants and OVERLAP, in this order.

    Triton specialises on types, on numbers that are 1 or multiples of 16 and on pointers that are multiples of 16: all
    of them are part of what a compiled kernel is found by, in place of Triton's own, slower look at every argument.
    The kernel has to call `begin(OVERLAP)` first and `release(OVERLAP)` towards its end. `options`: num_warps and
    num_stages.
    """
    kinds = [(t.dtype, t.data_ptr() % 16) for t in tensors]
    key = (kernel, tensors[0].device, numbers, constants, *kinds, *options.values())
    overlap = overlaps(tensors[0].device)
    found = _compiled.get(key)
    if found is not None:
        found[grid](*tensors, *numbers, *constants, overlap)
        return
    extra = {"launch_pdl": True} if overlap else {}
    found = kernel[grid](*tensors, *numbers, *constants, overlap, **options, **extra)
    if found is not None:  # Triton's interpreter compiles nothing
        if len(_compiled) >= KEPT:
            _compiled.clear()
        _compiled[key] = found
