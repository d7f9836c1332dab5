"""Counters by which the programs of one launch find out which of them arrives last."""

from __future__ import annotations

import torch
from triton.runtime import driver

CAPTURED = 1 << 20  # counters set aside for captured launches; beyond them a graph clears its own

_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_for_graphs: dict[torch.device, list[torch.Tensor]] = {}


def counters(count: int, device: torch.device) -> torch.Tensor:
    """`count` zeros, int32, which the launch that uses them has to leave as zeros.

    Launches of one stream run one after another and share theirs. A captured launch keeps its own for ever, because
    graphs captured on one stream may be replayed on several.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    count = -(-count // 4) * 4  # slices stay aligned to 16 bytes, which Triton compiles for
    spare = _for_graphs.setdefault(device, [])
    if torch.cuda.is_current_stream_capturing():
        if not spare or spare[0].numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        mine, spare[0] = spare[0][:count], spare[0][count:]
        return mine
    if not spare:
        spare.append(torch.zeros(CAPTURED, dtype=torch.int32, device=device))
    key = (device, driver.active.get_current_stream(device.index))  # a tenth of the time of torch.cuda.current_stream
    found = _of_stream.get(key)
    if found is None or found.numel() < count:
        found = _of_stream[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return found
