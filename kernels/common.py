"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Literal

import torch

_FOUND = importlib.util.find_spec("triton") is not None

Impl = Literal["auto", "triton", "reference"]

log = logging.getLogger(__name__)


def uses_triton(impl: Impl, tensor: torch.Tensor) -> bool:
    """Whether `impl` means the Triton kernel for inputs like `tensor`; "auto" logs why it does not.

    Tensors on the CPU go to the reference, unless impl="triton" meets TRITON_INTERPRET=1: Triton's interpreter is there
    for tests and far slower than the reference.

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
    if reason is None:
        return True
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}; use 'auto', or set TRITON_INTERPRET=1 to test.")
    if not torch.compiler.is_compiling():
        log.debug("reference instead of the kernel: %s", reason)
    return False


def processors(device: torch.device) -> int:
    """Multiprocessors to keep busy."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
