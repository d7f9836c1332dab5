"""Trains the gates of `dyvte`: when may the image leave without changing the answer?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mmefficient.fitting import training
from mmefficient.fitting.scenes import ASKED, IGNORE, Batch, Prompts, batches, model_inputs
from mmefficient.fitting.withdrawn import Withdrawal
from mmefficient.flops import layer_flops
from mmefficient.methods.reducers.dyvte import gate, gate_input
from mmefficient.models import adapter_for
from mmefficient.points import QuestionTokens

RATIO, SLACK = 1.03, 0.02
BIASES = torch.linspace(-20, 20, 401)


class Gates:
    """Gates of one frozen model, float32: `inner` [L-1, W, 2D], `outer` [L-1, 2, W]; gate i decides for layer i + 1."""

    def __init__(self, model: Any, processor: Any, width: int | None = None) -> None:
        self.model, self.processor, self.adapter = model, processor, adapter_for(model)
        self.config = self.adapter.decoder.config
        self.layers = len(self.adapter.layers)
        size, device = self.config.hidden_size, model.device
        width = width or size // 2
        torch.manual_seed(0)
        inner = torch.stack([nn.init.xavier_uniform_(torch.empty(width, 2 * size)) for _ in range(self.layers - 1)])
        outer = torch.stack([nn.init.xavier_uniform_(torch.empty(2, width)) for _ in range(self.layers - 1)])
        self.parameters = nn.ParameterDict({"inner": inner, "outer": outer}).to(device)

    @torch.no_grad()
    def examine(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate inputs float32 [L-1, B, 2D]; labels bool [L-1, B]: the image may leave at the input of layer i + 1."""
        run = Withdrawal(self.model, model_inputs(self.model, self.processor, batch), batch.labels.shape[1])
        index, used = batch.question(self.adapter.placeholders["image"])
        rows = torch.arange(len(index), device=index.device)[:, None]
        z, labels = [], []
        for layer, logits in run.shorter():
            z.append(gate_input(QuestionTokens(run.states[layer][rows, index], used)))
            labels.append(label(run.full, logits, batch.labels))
        return torch.stack(z).float(), torch.stack(labels)

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """Exit minus stay, [L-1, B]."""
        both = zip(z, self.parameters["inner"], self.parameters["outer"], strict=True)
        return torch.stack([gate(x, inner, outer) for x, inner, outer in both])

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy of all gates; share of right decisions, and of exits that would have been right."""
        z, labels = self.examine(batch)
        logits = self.logits(z)  # two-class cross-entropy on the difference of the two logits
        right = ((logits > 0) == labels).float().mean()
        return {
            "loss": F.binary_cross_entropy_with_logits(logits, labels.float()),
            "right": right,
            "may_exit": labels.float().mean(),
        }

    @torch.no_grad()
    def calibrate(self, prompts: Prompts, steps: int, target: float) -> dict[str, Any]:
        """The largest bias whose exits change at most `target` of the answers, mean over kinds of question."""
        logits, labels, kinds = [], [], []
        for batch in batches(prompts, 0, steps, 0, self.model.device):
            z, may = self.examine(batch)
            logits.append(self.logits(z))
            labels.append(may)
            kinds.append(batch.kinds)
        tokens = int(batch.mask.sum()) // len(batch.mask)
        text = tokens - int((batch.ids[0] == self.adapter.placeholders["image"]).sum())
        logit, may, kind = torch.cat(logits, 1), torch.cat(labels, 1), torch.cat(kinds)
        full, short = layer_flops(self.config, tokens), layer_flops(self.config, text)
        table = []
        for bias in BIASES.tolist():
            fires = torch.cat([logit + bias > 0, torch.ones_like(may[:1])])
            leaves = fires.long().argmax(0)  # L-1 = never
            changed = ~torch.cat([may, torch.ones_like(may[:1])]).gather(0, leaves[None])[0]
            present = [changed[kind == k].float().mean() for k in range(len(ASKED)) if bool((kind == k).any())]
            depth = leaves.float() + 1
            cost = (depth * full + (self.layers - depth) * short) / (self.layers * full)
            table.append(
                {
                    "bias": round(bias, 2),
                    "changed": round(float(torch.stack(present).mean()), 5),
                    "layers": round(float(depth.mean()), 3),
                    "prefill_flops": round(float(cost.mean()), 4),
                }
            )
        fitting = [row for row in table if row["changed"] <= target]
        chosen = fitting[-1] if fitting else table[0]
        near = [row for row in table if abs(row["bias"] - chosen["bias"]) < 3.01][::5]
        return {"bias": chosen["bias"], "target": target, "questions": len(kind), "chosen": chosen, "curve": near}


def label(full: torch.Tensor, short: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool [B]: teacher-forced, `short` predicts the tokens that `full` predicts, and its loss is hardly larger.

    Hardly: below 1.03 times, as published, plus 0.02 nats, since a ratio of losses near zero is noise.

    Args:
        full, short: logits [B, A, V]; labels: int64 [B, A], IGNORE where nothing is answered.
    """
    known = labels != IGNORE
    same = ((full.argmax(-1) == short.argmax(-1)) | ~known).all(1)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return each.view_as(labels).sum(1) / known.sum(1)

    return same & (loss(short) < RATIO * loss(full) + SLACK)


def fit(
    model: Any,
    processor: Any,
    out: Path,
    *,
    steps: int,
    rows: int,
    lr: float,
    seed: int,
    minutes: float,
    workers: int,
    target: float,
    checks: int,
) -> Path | None:
    """Train and calibrate; see `training.fit`."""
    gates = Gates(model, processor)

    def check() -> dict[str, Any]:
        found = gates.calibrate(Prompts(processor, rows, f"dyvte-check/{seed}"), checks, target)
        return {"layers": gates.layers, "bias": found["bias"], "calibration": found}

    prompts = Prompts(processor, rows, f"dyvte/{seed}")
    return training.fit("dyvte", gates, prompts, check, out, steps=steps, lr=lr, minutes=minutes, workers=workers)
