"""Low-rank changes of the reference model's weights: `W + B @ A`, kept in one small file beside the checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ("gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """A frozen linear layer plus a trainable product of two thin matrices; starts as the layer itself."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features, device=linear.weight.device) / rank)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.A.T) @ self.B.T


def attach(model: nn.Module, rank: int) -> dict[str, LowRank]:
    """Freeze `model` and put a `LowRank` in place of every feed-forward matrix of its decoder; returned by name."""
    model.requires_grad_(False)
    found = {}
    for name, module in list(model.named_modules()):
        if "language_model.layers." in name and name.rsplit(".", 1)[-1] in TARGETS and isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            found[name] = LowRank(module, rank)
            setattr(model.get_submodule(parent), own, found[name])
    return found


def save(layers: dict[str, LowRank], scale: float, path: Path) -> None:
    """Write the delta, times `scale`, in bf16."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.A"] = layer.A.detach().cpu().to(torch.bfloat16).contiguous()
        tensors[f"{name}.B"] = (layer.B.detach().cpu() * scale).to(torch.bfloat16).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


@torch.no_grad()
def add(model: nn.Module, path: Path, scale: float = 1.0) -> None:
    """Add the delta at `path`, times `scale`, to a stock model's weights; the sum is rounded once."""
    tensors = load_file(path)
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        weight = model.get_parameter(f"{name}.weight")
        a, b = (tensors[f"{name}.{part}"].to(weight.device, torch.float32) for part in "AB")
        weight.copy_(weight.float() + scale * (b @ a))
