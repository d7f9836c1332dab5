"""What every training run here does besides learning: draw batches, note figures, keep its state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

LOG_EVERY = 50


def stream(
    data: Dataset[dict[str, Tensor]], start: int, stop: int, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """``data[start]`` to ``data[stop - 1]``, whole batches made by `workers` processes, on `device`."""
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def note(out: Path, record: Mapping[str, Any]) -> None:
    """Print one line of figures as JSON, and add it to `out`/log.jsonl."""
    line = json.dumps(record)
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def keep(out: Path, state: Mapping[str, Any]) -> None:
    """Replace `out`/state.pt in one step, so that a killed run never leaves half of it."""
    torch.save(state, out / "state.tmp")
    (out / "state.tmp").replace(out / "state.pt")


def scored(sums: Mapping[str, Tensor], kinds: tuple[str, ...]) -> dict[str, float]:
    """Share of questions answered exactly, by kind that was asked, from summed "correct" and "asked" [kinds]."""
    asked, correct = sums["asked"].tolist(), sums["correct"].tolist()
    return {k: round(c / a, 4) for k, c, a in zip(kinds, correct, asked, strict=True) if a}
