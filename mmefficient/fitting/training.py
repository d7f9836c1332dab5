"""A small training loop that can be killed and resumed, and the states of a frozen model that it learns from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mmefficient.fitting.scenes import Batch, Prompts, batches
from mmefficient.models.reference.record import keep, note
from mmefficient.profiles import Checkpoint, Profile

LOG_EVERY = 20
SAVE_EVERY = 100


class Learner(Protocol):
    """What learns beside a frozen model: `loss` of a batch gives "loss", and whatever else is to be logged."""

    model: Any
    adapter: Any
    parameters: nn.ParameterDict

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]: ...


@contextmanager
def inputs_of(layers: Any, wanted: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Notes what enters the decoder layers `wanted`, [B, S, D] each, while the `with` block runs."""
    seen: dict[int, torch.Tensor] = {}
    handles = []
    for index in wanted:

        def take(module: Any, args: tuple[torch.Tensor, ...], index: int = index) -> None:
            seen[index] = args[0]

        handles.append(layers[index].register_forward_pre_hook(take))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def train(
    parameters: nn.ParameterDict,
    loss: Callable[[Any], dict[str, torch.Tensor]],
    batches: Callable[[int, int], Iterator[Any]],
    out: Path,
    steps: int,
    lr: float,
    minutes: float,
) -> int:
    """AdamW with a linear warm-up and a cosine to zero; goes on from `out`/state.pt, and leaves it there.

    Args:
        loss: of a batch: "loss", and whatever else is to be logged; batches: those of the steps from one to another.
        minutes: stop, resumably, after this long.

    Returns:
        the steps done so far, all calls together.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(parameters.parameters(), lr=lr, weight_decay=0.01)
    state, step = out / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        parameters.load_state_dict(saved["parameters"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    deadline = time.monotonic() + 60 * minutes
    sums: dict[str, torch.Tensor] = {}
    for batch in batches(step, steps) if step < steps else ():
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        rate = lr * warm * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = loss(batch)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums = {name: sums.get(name, torch.zeros(())).to(x.device) + x.detach() for name, x in found.items()}
        step += 1
        late = time.monotonic() > deadline
        if step % LOG_EVERY == 0 or step == steps:
            count = step % LOG_EVERY or LOG_EVERY
            record = {"step": step, "lr": rate, **{name: round(float(x) / count, 5) for name, x in sums.items()}}
            sums = {}
            note(out, record)
        if step % SAVE_EVERY == 0 or step == steps or late:
            keep(out, {"parameters": parameters.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        if late:
            break
    return step


def fit(
    method: str,
    learner: Learner,
    prompts: Prompts,
    check: Callable[[], dict[str, Any]],
    out: Path,
    *,
    steps: int,
    lr: float,
    minutes: float,
    workers: int,
) -> Path | None:
    """Train on `prompts`, round to bfloat16 as shipped, and write the profile of `method` with what `check` finds then.

    Returns:
        the profile's path, or None if the time was up before the last step.
    """
    done = train(
        learner.parameters,
        learner.loss,
        lambda start, stop: batches(prompts, start, stop, workers, learner.model.device),
        out,
        steps,
        lr,
        minutes,
    )
    if done < steps:
        return None
    for parameter in learner.parameters.values():
        parameter.data = parameter.data.bfloat16().float()
    facts = {**check(), "steps": done, "rows": prompts.rows, "lr": lr}
    path = out / f"{method}-fitted.json"
    tensors = {name: parameter.detach().bfloat16().cpu() for name, parameter in learner.parameters.items()}
    Profile.make(method, Checkpoint(learner.model, len(learner.adapter.layers)), facts).write(path, tensors)
    return path
