"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal

import torch

_FOUND = importlib.util.find_spec("triton") is not None

Impl = Literal["auto", "triton", "reference"]

_AS_IT_IS = nullcontext()

log = logging.getLogger(__name__)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def uses_triton(impl: Impl, tensor: torch.Tensor, *others: torch.Tensor | None, backward: bool = False) -> bool:
    """Whether `impl` means the Triton kernel for these inputs, all where `tensor` is; "auto" logs why it does not.

    Tensors on the CPU go to the reference, unless impl="triton" meets TRITON_INTERPRET=1: Triton's interpreter is there
    for tests and far slower than the reference. So do inputs that need a gradient, unless there is a `backward`.

    Raises:
        ValueError: `impl` is none of the three names.
        RuntimeError: "triton" was asked for and cannot run here; says why.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is 'auto', 'triton' or 'reference', not {impl!r}.")
    if impl == "reference":
        return False
    reason = None
    if not _FOUND:
        reason = "triton is not installed"
    elif not tensor.is_cuda and (impl == "auto" or os.environ.get("TRITON_INTERPRET") != "1"):
        reason = f"the tensors are on {tensor.device.type!r} and Triton's interpreter is not asked for"
    elif not backward and needs_gradient(tensor, *others):
        reason = "an input requires a gradient and the kernel has no backward"
    if reason is None:
        return True
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}; impl='auto' takes the reference.")
    if not torch.compiler.is_compiling():
        log.debug("reference instead of the kernel: %s", reason)
    return False


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `tensor`, for models spread over several."""
    if not tensor.is_cuda or torch.compiler.is_compiling() or tensor.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(tensor.device)


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors to keep busy."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; those of a Hopper GPU where there is none."""
    if device.type != "cuda":
        return 232_448
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def ceil_div(number: int, by: int) -> int:
    """The quotient rounded up, at a tenth of `triton.cdiv`'s host time."""
    return -(-number // by)


def power_above(number: int) -> int:
    """The smallest power of two that is not below `number` >= 1, at a tenth of `triton.next_power_of_2`'s host time."""
    return 1 << (number - 1).bit_length()


def power_below(number: int) -> int:
    """The largest power of two that is not above `number`; 1 for less."""
    return 1 << max(number.bit_length() - 1, 0) if number > 0 else 1
