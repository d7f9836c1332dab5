"""Heads that do not see the image, against explicit attention matrices (prefill and 9 more tokens)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.errors import PlanError
from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import logits
from tests.methods.modulation_oracle import Layer, edited, plain

STEPS = 9
MASK = ((1, 0), (1, 2), (3, 1))
BLIND = {1: (1, 3), 3: (0, 2, 3)}


def unnormalised(layer: Layer) -> torch.Tensor:
    """Probabilities of visual keys times 0 after the softmax."""
    weights = layer.logits.softmax(-1)
    for head in BLIND.get(layer.index, ()):
        weights[:, head] = weights[:, head].masked_fill(layer.image[:, None], 0.0)
    return layer.out(weights)


def renormalised(layer: Layer) -> torch.Tensor:
    """Logits of visual keys -inf before the softmax."""
    for head in BLIND.get(layer.index, ()):
        layer.logits[:, head] = layer.logits[:, head].masked_fill(layer.image[:, None], float("-inf"))
    return plain(layer)


@pytest.mark.parametrize("form", [unnormalised, renormalised])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_explicit_matrices(form: Any, implementation: str) -> None:
    batch, model = tiny.ragged_batch("llava"), tiny.build("llava", "eager")
    with edited(model, batch["input_ids"], batch["attention_mask"], form):
        expected = logits(model, batch, max_new_tokens=STEPS)
    model = tiny.build("llava", implementation)
    stock = logits(model, batch, max_new_tokens=STEPS)
    with Plan(f"visual_heads(mask={MASK},form={form.__name__})").apply(model):
        found = logits(model, batch, max_new_tokens=STEPS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - stock)[:, [0, 2]].abs().max() > 1e-3
    torch.testing.assert_close(found[:, 1], stock[:, 1], rtol=0, atol=1e-5)  # a row without image


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("form", ["unnormalised", "renormalised"])
def test_families(family: str, form: str) -> None:
    """Rows of a batch are those alone; all heads named is the stock model; with no head in any layer, text is all."""
    model, prompts = tiny.build(family), tiny.ragged_prompts(family)
    batch = tiny.collate(family, prompts)
    with Plan(f"visual_heads(mask={MASK},form={form})").apply(model):
        together = logits(model, batch)
        for row, each in enumerate(prompts):
            alone = logits(model, tiny.collate(family, [each]))[:, 0]
            torch.testing.assert_close(together[:, row], alone, rtol=0, atol=1e-5)
    with Plan(f"visual_heads(mask={tuple((1, head) for head in range(4))},form={form})").apply(model):
        found = logits(model, batch)
    torch.testing.assert_close(found, logits(model, batch), rtol=0, atol=1e-5)


def test_bad_masks() -> None:
    for text in ("visual_heads(mask=())", "visual_heads(mask=(1,2))", "visual_heads(mask=((1,0),),form=lost)"):
        with pytest.raises(PlanError):
            Plan(text)
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with pytest.raises(PlanError, match="heads 0 to 3"), Plan("visual_heads(mask=((1,4),))").apply(model):
        logits(model, batch)
    with pytest.raises(PlanError, match="layers 0 to 3"), Plan("visual_heads(mask=((4,0),))").apply(model):
        pass
