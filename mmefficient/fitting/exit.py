"""Measures where `exit` may act: the divergence of the next token when the image leaves at each layer (VTW)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmefficient.fitting.scenes import Prompts, batches, model_inputs
from mmefficient.fitting.training import encoded_once
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint, Profile


@torch.no_grad()
def divergences(model: Any, processor: Any, prompts: Prompts, steps: int) -> list[float]:
    """KL(stock || image left at the input of layer K) of the prompt's next token, in nats, for K = 1 .. L-1, means."""
    adapter = adapter_for(model)
    layers, count = len(adapter.layers), 0
    total = torch.zeros(layers - 1)
    for batch in batches(prompts, 0, steps, 0, model.device):
        inputs = model_inputs(model, processor, batch)
        behind = batch.labels.shape[1] - 1 - torch.arange(batch.labels.shape[1], device=model.device)
        first = behind == batch.answered[:, None]  # the row that predicts the first answer token
        with encoded_once(adapter.base):
            stock = _next_token(model, inputs, first, Plan())
            for layer in range(1, layers):
                short = _next_token(model, inputs, first, Plan(f"exit(layer={layer})"))
                total[layer - 1] += (stock.exp() * (stock - short)).sum().cpu()
        count += len(batch.ids)
    return (total / count).tolist()


def _next_token(model: Any, inputs: dict[str, torch.Tensor], first: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Log-probabilities [B, V] in the rows `first`, bool [B, A], of the last A."""
    with plan.apply(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=first.shape[1]).logits
    return logits.float().log_softmax(-1)[first]


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
