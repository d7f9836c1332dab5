"""DyVTE (Wu et al., NeurIPS 2025): small trained gates decide, layer by layer, when all visual tokens leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch.nn import functional as F

from mmefficient.errors import ModelError
from mmefficient.points import QuestionTokens, Reducer, Scope, Selection, VisualTokens, about, order_selection
from mmefficient.profiles import Checkpoint, Profile


@dataclass(frozen=True)
class DyVTE(Reducer):
    """One gate after every layer, on the states of the question alone; a row's tokens leave when its gate fires."""

    name: ClassVar[str] = "dyvte"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.19628"
    summary: ClassVar[str] = "all visual tokens leave when a trained gate says that the question has read them"
    many_turns: ClassVar[bool] = False
    shared_by: ClassVar[Scope] = "prompt"

    gates: str = field(
        default="auto", metadata=about("profile with the gates; auto = the one made for this checkpoint", quiet=True)
    )
    bias: float = field(default=0.0, metadata=about("added to the gates' logit: more than 0 exits earlier"))

    def stages(self, checkpoint: Checkpoint) -> tuple[Reducer, ...]:
        profile = checkpoint.profile(self.name, self.gates)
        if profile.facts["layers"] != checkpoint.layers:
            raise ModelError(f"the gates are for {profile.facts['layers']} layers; the model has {checkpoint.layers}.")
        bias = self.bias + profile.facts["bias"]
        return tuple(_Gate(layer, str(profile.path), bias) for layer in range(1, checkpoint.layers))


@dataclass(frozen=True)
class _Gate(Reducer):
    name: ClassVar[str] = "dyvte"
    needs: ClassVar[frozenset[str]] = frozenset({"question"})
    shared_by: ClassVar[Scope] = "prompt"
    adaptive: ClassVar[bool] = True

    layer: int
    gates: str
    bias: float

    def choose(self, tokens: VisualTokens) -> tuple[Selection, list[int]]:
        assert tokens.question is not None
        weights = _weights(self.gates, tokens.hidden.device, tokens.hidden.dtype)
        here = (weights[name][self.layer - 1] for name in ("inner", "outer"))
        fires = (gate(gate_input(tokens.question), *here) + self.bias > 0).tolist()
        counts = [0 if fired else unit.count for fired, unit in zip(fires, tokens.units, strict=True)]
        everything = torch.arange(tokens.valid.shape[1], device=tokens.valid.device).expand_as(tokens.valid)
        return order_selection(everything, counts), counts


def gate_input(question: QuestionTokens) -> torch.Tensor:
    """z = [mean of the question's states without the last, the last one's], [U, 2D]."""
    count = question.valid.sum(1)
    place = torch.arange(question.valid.shape[1], device=count.device)
    last = (count - 1).clamp(min=0)
    before = (place < last[:, None]).to(question.hidden.dtype)
    mean = (before[:, None] @ question.hidden)[:, 0] / last.clamp(min=1)[:, None]
    final = question.hidden.gather(1, last[:, None, None].expand(-1, 1, question.hidden.shape[2]))[:, 0]
    return torch.cat([mean.to(final), final], 1)


def gate(z: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """Logit of exit minus logit of staying, float32 [U]; inner: [hidden, 2D], outer: [2, hidden]."""
    logits = F.linear(F.gelu(F.linear(z, inner)), outer).float()
    return logits[:, 1] - logits[:, 0]


@lru_cache(maxsize=8)
def _weights(path: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return Profile.read(path).tensors(device, dtype)
