"""The processes that share an evaluation, as `accelerate launch` or `torchrun` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """`rank` of `size`; `device` is where this process computes, None when it runs alone and may choose.

    `crowded`: there are more processes than GPUs, which they share: good for small models, not for timing.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None
    crowded: bool = False

    @classmethod
    def current(cls) -> Processes:
        """Joins the process group that the launcher describes in the environment, if there is one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        gpus = torch.cuda.device_count()
        crowded = 0 < gpus < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # ranks meet only at the beginning and at the end: the default timeout of 30 minutes would end a long run
        state = PartialState(cpu=not gpus or crowded, timeout=timedelta(days=7))
        if crowded:  # they gather on the CPU: NCCL wants a device for each
            device = f"cuda:{state.local_process_index % gpus}"
        else:
            device = "cpu" if state.device.type == "cpu" else str(state.device)
        return cls(state.process_index, state.num_processes, device, crowded)

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, by rank; every process has to call it."""
        return items if self.size == 1 else list(gather_object(items))
