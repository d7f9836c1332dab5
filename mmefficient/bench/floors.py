"""The least time the hardware allows: what the work is, and what this device multiplies and moves per second.

`Work` counts FLOPs (2 per multiply-accumulate) and bytes that no implementation avoids: every weight that is used is
read once, every key and value written once and read once per step. Attention between rows of one prompt counts the
pairs that a causal mask leaves, so half of what `flops.layer_flops` (the literature's convention) counts. Of the last
decoder layer and the vision tower only what is read counts, which stock modules do not know.
Activations count no bytes: a perfect implementation would not spill them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmefficient.flops import kv_bytes, pair_flops, stored_flops, token_flops
from mmefficient.graph.tower import lean_tower
from mmefficient.models import adapter_for
from mmefficient.vision import Watcher

SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
COPIED = {"cpu": 2**26, "cuda": 2**30}
"""Bytes that are copied."""


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device: FLOP/s of a large matrix product, and bytes/s (read plus written) of a copy."""

    flops: float
    bandwidth: float

    def floors_ms(self, work: Work) -> tuple[float, float]:
        """Milliseconds that the FLOPs of `work` take at least, and its bytes."""
        return work.flops / self.flops * 1e3, work.bytes / self.bandwidth * 1e3

    def floor_ms(self, flops: float, moved: float) -> float:
        """Milliseconds that `flops` operations and `moved` bytes take at least."""
        return max(self.floors_ms(Work(flops, moved)))


def vision_work(model: Any, inputs: dict[str, Any]) -> Work:
    """Of encoding the images of `inputs`: FLOPs counted while they are encoded once, and the weights outside the LM.

    Tower layers behind the last one that is read do not run.
    """
    named = {"pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"}
    given = {name: value for name, value in inputs.items() if name in named}
    watcher = Watcher(adapter_for(model))
    with torch.no_grad(), lean_tower(watcher, given), FlopCounterMode(display=False) as counter:
        model.base_model.get_image_features(**given)
    text = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in text)
    return Work(counter.get_total_flops(), weights + inputs["pixel_values"].nbytes)


def prefill_work(model: Any, held: Sequence[Sequence[int]]) -> Work:
    """Of reading a prompt; `held[row][layer]` tokens are in each decoder layer. The head sees one token per row."""
    config, head = model.get_decoder().config, model.get_output_embeddings().weight
    flops = sum(n * token_flops(config) + n * (n + 1) / 2 * pair_flops(config) for row in held for n in row[:-1])
    # of what the last layer makes one row is read
    flops += sum((row[-1] - 1) * stored_flops(config) + row[-1] * pair_flops(config) for row in held)
    flops += len(held) * (token_flops(config) + 2 * head.numel())
    return Work(flops, _weights(model) + cache_bytes(model, held))


def decode_work(model: Any, held: Sequence[Sequence[int]]) -> Work:
    """Of one decoding step of every row, with `held` as in `prefill_work` in the cache."""
    config, head = model.get_decoder().config, model.get_output_embeddings().weight
    flops = sum(token_flops(config) + (n + 1) * pair_flops(config) for row in held for n in row)
    return Work(flops + 2 * len(held) * head.numel(), _weights(model) + cache_bytes(model, held))


def cache_bytes(model: Any, held: Sequence[Sequence[int]]) -> int:
    """Bytes of the keys and values of `held` tokens."""
    return kv_bytes(model.get_decoder().config, sum(map(sum, held)), model.dtype.itemsize)


def _weights(model: Any) -> int:
    """Bytes of the decoder layers and the head; an embedding is a look-up of few rows."""
    parts: list[nn.Module] = [model.get_decoder().layers, model.get_output_embeddings()]
    return sum(p.nbytes for part in parts for p in part.parameters())


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings with random data (zeros run faster than real data on some chips); about two seconds."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    side = SIDE[kind]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(COPIED[kind] // 4, device=device)
    target = torch.empty_like(source)
    multiply = median_ms(lambda: a @ b, device, 10)
    copy = median_ms(lambda: target.copy_(source), device, 10)
    return Ceilings(2 * side**3 / multiply * 1e3, 2 * source.nbytes / copy * 1e3)


def median_ms(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of `work` in ms after three warm-up calls, with the device synchronised around each call."""
    for _ in range(3):
        work()
    return statistics.median(wall_ms(work, device) for _ in range(repeats))


def wall_ms(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call of `work` in ms, with the device synchronised before and after."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device; others have nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
