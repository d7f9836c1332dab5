"""LoRA through peft under a plan, as docs/fine-tuning.md has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.plan import Plan
from tests import tiny

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("plan", ["composite", "no_visual_self(scope=nothing)", "shortv(layers=(1, 2))"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_loss_falls(family: str, plan: str) -> None:
    model, batch = tiny.build(family), tiny.ragged_batch(family)
    matrices = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    trained: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=matrices)).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    text = (batch["attention_mask"] == 1) & (batch["input_ids"] < tiny.IMAGE)
    labels, losses = batch["input_ids"].masked_fill(~text, -100), []
    with Plan(plan).apply(model):
        for _ in range(4):
            loss = trained(**batch, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
