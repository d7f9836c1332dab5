"""Launches that cost the host little: a kernel compiled for a call is found again without looking at every argument."""

from __future__ import annotations

from typing import Any

import torch

KEPT = 4096  # calls remembered; beyond them all are forgotten

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    **options: int,
) -> None:
    """Run a Triton kernel whose parameters are tensors, then numbers, then compile-time constants, in this order.

    Triton specialises on types, on numbers that are 1 or multiples of 16 and on pointers that are multiples of 16: all of
    them are part of what a compiled kernel is found by. `options`: num_warps and the like.
    """
    kinds = [(t.dtype, t.data_ptr() % 16) for t in tensors]
    key = (kernel, tensors[0].device, numbers, constants, *kinds, *options.values())
    found = _compiled.get(key)
    if found is not None:
        found[grid](*tensors, *numbers, *constants)
        return
    found = kernel[grid](*tensors, *numbers, *constants, **options)
    if found is not None:  # Triton's interpreter compiles nothing
        if len(_compiled) >= KEPT:
            _compiled.clear()
        _compiled[key] = found
