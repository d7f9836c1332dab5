"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Literal

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton's kernels run in its interpreter, on the CPU; Triton, too, looks once."""

_FOUND = importlib.util.find_spec("triton") is not None

Impl = Literal["auto", "triton", "reference"]

log = logging.getLogger(__name__)


def uses_triton(impl: Impl, tensor: torch.Tensor) -> bool:
    """Whether `impl` means the Triton kernel for inputs like `tensor`; "auto" logs why it does not.

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
    elif not tensor.is_cuda and not INTERPRETED:
        reason = f"the tensors are on {tensor.device.type!r} and TRITON_INTERPRET=1 is not set"
    if reason is None:
        return True
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}; use impl='reference' or 'auto'.")
    if not torch.compiler.is_compiling():
        log.debug("reference instead of the kernel: %s", reason)
    return False


def processors(device: torch.device) -> int:
    """Multiprocessors to keep busy."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
