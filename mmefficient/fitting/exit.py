"""Measures where `exit` may act: the divergence of the next token when the image leaves at each layer (VTW)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmefficient.fitting.scenes import Prompts, batches, model_inputs
from mmefficient.fitting.withdrawn import Withdrawal
from mmefficient.models import adapter_for
from mmefficient.profiles import Checkpoint, Profile


@torch.no_grad()
def divergences(model: Any, processor: Any, prompts: Prompts, steps: int) -> list[float]:
    """KL(stock || image left at the input of layer K) of the prompt's next token, in nats, for K = 1 .. L-1, means."""
    layers, count = len(adapter_for(model).layers), 0
    total = torch.zeros(layers - 1)
    for batch in batches(prompts, 0, steps, 0, model.device):
        width = batch.labels.shape[1]
        run = Withdrawal(model, model_inputs(model, processor, batch), width)
        behind = width - 1 - torch.arange(width, device=model.device)
        first = behind == batch.answered[:, None]  # the row that predicts the first answer token
        stock = run.full[first].float().log_softmax(-1)
        for layer, logits in run.shorter():
            short = logits[first].float().log_softmax(-1)
            total[layer - 1] += (stock.exp() * (stock - short)).sum().cpu()
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
