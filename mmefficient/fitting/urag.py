"""Trains the retrieval head of `urag`: which page is the question about?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mmefficient.fitting import training
from mmefficient.fitting.scenes import Batch, Prompts, batches, model_inputs
from mmefficient.fitting.training import inputs_of
from mmefficient.methods.reducers.urag import embed, late_interaction
from mmefficient.models import adapter_for
from mmefficient.plan import Plan


class Head:
    """The head of one frozen model, on what enters decoder layer `layer`; widths D/2 and D/4."""

    def __init__(self, model: Any, processor: Any, layer: int) -> None:
        self.model, self.processor, self.layer, self.adapter = model, processor, layer, adapter_for(model)
        size = self.adapter.decoder.config.hidden_size
        torch.manual_seed(0)
        first, second = nn.Linear(size, size // 2), nn.Linear(size // 2, size // 4)
        weights = {"inner": first.weight, "inner_bias": first.bias, "outer": second.weight, "outer_bias": second.bias}
        self.parameters = nn.ParameterDict({name: x.data for name, x in weights.items()}).to(model.device)

    def scores(self, batch: Batch) -> torch.Tensor:
        """Of every page, float32 [B, P]."""
        with torch.no_grad(), inputs_of(self.adapter.layers, [self.layer]) as seen:
            self.model(**model_inputs(self.model, self.processor, batch), use_cache=False, logits_to_keep=1)
        hidden, token = seen[self.layer].float(), self.adapter.placeholders["image"]
        rows, count = len(batch.ids), int((batch.ids[:1] == token).sum())
        pages = len(batch.layers) // rows
        index, used = batch.question(token)
        question = hidden[torch.arange(rows, device=index.device)[:, None], index]
        visual = hidden[batch.ids == token].view(rows, pages, count // pages, -1)
        weights = dict(self.parameters.items())
        asked, shown = embed(question, weights), embed(visual, weights)
        valid = torch.ones(rows, count // pages, dtype=torch.bool, device=index.device)
        return torch.stack([late_interaction(asked, used, shown[:, page], valid) for page in range(pages)], 1)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """softplus(the hardest wrong page's score - the right page's), as published for one right page."""
        scores = self.scores(batch)
        right = scores.gather(1, batch.page[:, None])[:, 0]
        wrong = scores.scatter(1, batch.page[:, None], float("-inf")).amax(1)
        return {"loss": F.softplus(wrong - right).mean(), "first": (right > wrong).float().mean()}

    @torch.no_grad()
    def check(self, prompts: Prompts, steps: int) -> dict[str, float]:
        """Share of questions whose page is ranked first: by the head, and by question attention in the same layer."""
        head, attention, asked = 0.0, 0.0, 0
        for batch in batches(prompts, 0, steps, 0, self.model.device):
            head += float((self.scores(batch).argmax(1) == batch.page).sum())
            # without the answers, which the question's attention must not see
            last = batch.ids.shape[1] - batch.answered
            for row in range(len(batch.ids)):
                inputs = model_inputs(self.model, self.processor, _one(batch, row, int(last[row])))
                with Plan(f"urag(keep=1,layer={self.layer})").apply(self.model) as run:
                    self.model(**inputs, use_cache=False, logits_to_keep=1)
                report = run.report()
                kept = report.places[0][report.kept(0, self.layer)[0], 0]
                attention += float(kept == batch.page[row].cpu())
            asked += len(batch.ids)
        return {"questions": asked, "head": round(head / asked, 4), "attention": round(attention / asked, 4)}


def _one(batch: Batch, row: int, end: int) -> Batch:
    """One row up to the column `end`."""
    pages = len(batch.layers) // len(batch.ids)
    start = int((batch.mask[row] == 0).sum())
    own, scenes = slice(row, row + 1), slice(row * pages, (row + 1) * pages)
    return Batch(
        ids=batch.ids[own, start:end],
        mask=batch.mask[own, start:end],
        labels=batch.labels[own],
        answered=batch.answered[own],
        kinds=batch.kinds[own],
        page=batch.page[own],
        layers=batch.layers[scenes],
        background=batch.background[scenes],
    )


def fit(
    model: Any,
    processor: Any,
    out: Path,
    *,
    layer: int,
    pages: int,
    steps: int,
    rows: int,
    lr: float,
    seed: int,
    minutes: float,
    workers: int,
    checks: int,
) -> Path | None:
    """Train and check; see `training.fit`."""
    head = Head(model, processor, layer)

    def check() -> dict[str, Any]:
        found = head.check(Prompts(processor, rows, f"urag-check/{seed}", pages), checks)
        return {"layer": layer, "pages": pages, "ranked_first": found}

    prompts = Prompts(processor, rows, f"urag/{seed}", pages)
    return training.fit("urag", head, prompts, check, out, steps=steps, lr=lr, minutes=minutes, workers=workers)
