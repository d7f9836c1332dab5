"""Small deltas on a checkpoint: low-rank updates of the decoder's matrices, and projectors of a method.

A delta is a folder with ``delta.safetensors`` (bfloat16) and ``delta.json`` (what it belongs to, the plan it was
trained under, the command that made it). Loading adds it to the weights; the model stays a stock one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmefficient.environment import command
from mmefficient.errors import ModelError
from mmefficient.methods.rows.saisa import PROJECTORS

VARIANTS = Path(__file__).parent / "variants"
WEIGHTS = "delta.safetensors"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Linear):
    """A frozen matrix W with a trained update: W + b @ a, where b starts at zero (LoRA, arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, device=device) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


def attach(model: Any, rank: int, names: Sequence[str] = ALL, projectors: bool = False) -> list[nn.Parameter]:
    """Freeze `model` and give it what is to be trained; returns those parameters.

    Args:
        rank: of the updates of the matrices `names` in every decoder layer.
        projectors: also one projector per layer, each a copy of the model's own.
    """
    model.requires_grad_(False)
    for module in list(model.get_decoder().layers.modules()):
        for name, child in list(module.named_children()):
            if name in names:
                setattr(module, name, LowRank(child, rank))
    if projectors:
        setattr(model.model, PROJECTORS, _projectors(model).requires_grad_())
    parts = [p for m in model.modules() if isinstance(m, LowRank) for p in (m.a, m.b)]
    return parts + list(getattr(model.model, PROJECTORS, nn.ModuleList()).parameters())


def _projectors(model: Any) -> nn.ModuleList:
    own = model.model.multi_modal_projector
    made = nn.ModuleList(type(own)(model.config) for _ in model.get_decoder().layers)
    for each in made:
        each.load_state_dict(own.state_dict())
    return made.to(next(own.parameters()))


def save(model: Any, folder: Path, scale: float = 1.0, **facts: Any) -> None:
    """Write what `attach` added, updates times `scale`, and `facts` beside it."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            found |= {f"{name}.a": module.a, f"{name}.b": module.b * scale}
    if hasattr(model.model, PROJECTORS):
        found |= {f"model.{PROJECTORS}.{n}": p for n, p in getattr(model.model, PROJECTORS).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    small = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in found.items()}
    save_file(small, folder / WEIGHTS)
    facts = {"base": "reference", **facts, "command": command()}
    (folder / "delta.json").write_text(json.dumps(facts, indent=1) + "\n")


def resume(model: Any, folder: Path) -> None:
    """Give what `attach` added the numbers of a delta of the same plan.

    Raises:
        ModelError: the delta has other parts.
    """
    found, added = load_file(folder / WEIGHTS), {n: p for n, p in model.named_parameters() if p.requires_grad}
    if found.keys() != added.keys() or any(found[name].shape != p.shape for name, p in added.items()):
        raise ModelError(f"the delta at {folder} has other parts than this plan trains; use another folder.")
    with torch.no_grad():
        for name, parameter in added.items():
            parameter.copy_(found[name])


def chain(folder: Path) -> list[Path]:
    """The deltas to add, in order, for the one in `folder`: those of the variant that it was trained on, and it.

    Raises:
        ModelError: it, or one that it needs, is not there.
    """
    if not (folder / WEIGHTS).is_file():
        known = sorted(path.parent.name for path in VARIANTS.glob(f"*/{WEIGHTS}"))
        raise ModelError(
            f"there is no delta at {folder}; the reference model comes with: {', '.join(known) or 'none'}."
        )
    _, _, before = json.loads((folder / "delta.json").read_text())["base"].rpartition("+")
    return [*(chain(VARIANTS / before) if before != "reference" else []), folder]


def load(model: Any, folder: Path) -> None:
    """Add the delta in `folder` to the weights of `model`, which is what it was trained on.

    Raises:
        ModelError: it belongs to another model.
    """
    found = load_file(folder / WEIGHTS)
    if any(name.startswith(f"model.{PROJECTORS}.") for name in found):
        setattr(model.model, PROJECTORS, _projectors(model).requires_grad_(False).eval())
    parameters = dict(model.named_parameters())
    for name, value in found.items():
        stem, _, part = name.rpartition(".")
        target = parameters.get(name if part not in "ab" else f"{stem}.weight")
        try:
            if target is None:
                raise KeyError
            with torch.no_grad():
                if part == "b":
                    update = value.float() @ found[f"{stem}.a"].float()
                    target.copy_((target.float() + update.to(target.device)).to(target.dtype))
                elif part != "a":
                    target.copy_(value)
        except (KeyError, RuntimeError) as error:
            raise ModelError(f"the delta at {folder} does not fit this model ({name}).") from error
