"""Measures where `exit` may act: the divergence of the next token when the image leaves at each layer (VTW)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmefficient.fitting.scenes import Prompts, batches, model_inputs
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint, Profile


@torch.no_grad()
def divergences(model: Any, processor: Any, prompts: Prompts, steps: int) -> list[float]:
    """KL(stock || image left at the input of layer K) of the prompt's next token, in nats, for K = 1 .. L-1, means."""
    layers = len(adapter_for(model).layers)
    total, count = torch.zeros(layers - 1), 0
    for batch in batches(prompts, 0, steps, 0, model.device):
        first = (torch.arange(batch.labels.shape[1], device=model.device) - batch.labels.shape[1] + 1).eq(
            -batch.answered[:, None]
        )  # the row that predicts the first answer token

        def next_token(plan: str) -> torch.Tensor:
            with Plan(plan).apply(model):
                inputs = model_inputs(model, processor, batch)  # noqa: B023
                logits = model(**inputs, use_cache=False, logits_to_keep=batch.labels.shape[1]).logits  # noqa: B023
            return logits.float().log_softmax(-1)[first]  # noqa: B023

        stock = next_token("none")
        for layer in range(1, layers):
            short = next_token(f"exit(layer={layer})")
            total[layer - 1] += (stock.exp() * (stock - short)).sum(-1).sum().cpu()
        count += len(batch.ids)
    return (total / count).tolist()


def fit(model: Any, processor: Any, out: Path, *, samples: int, rows: int, threshold: float, seed: int) -> Path:
    """Write the profile: the first layer from which on no layer's divergence exceeds `threshold`."""
    steps = -(-samples // rows)
    kl = divergences(model, processor, Prompts(processor, rows, f"exit/{seed}"), steps)
    above = [layer for layer, value in enumerate(kl, start=1) if value > threshold]
    facts = {
        "layer": above[-1] + 1 if above else 1,
        "threshold": threshold,
        "samples": steps * rows,
        "kl": {str(layer): float(f"{value:.4g}") for layer, value in enumerate(kl, start=1)},
    }
    path = out / "exit-fitted.json"
    Profile.make("exit", Checkpoint(model, len(kl) + 1), facts).write(path)
    return path
