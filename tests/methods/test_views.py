"""Views against two stock models, each reading everything again at every step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmefficient.errors import InputError, ModelError, PlanError
from mmefficient.methods.views.vcd import VCD
from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import GREEDY, logits

STEPS = 9


def noisy(pixels: torch.Tensor, step: int) -> torch.Tensor:
    """VCD's picture, as the paper and its released schedule have it."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, 0)[step]
    noise = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise


@torch.no_grad()
def reading_again(model: Any, batch: dict[str, Any], new: torch.Tensor) -> torch.Tensor:
    """Stock logits of every step, without a cache; [steps, B, V]."""
    steps = []
    for step in range(new.shape[1]):
        ids = torch.cat([batch["input_ids"], new[:, :step]], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(new[:, :step])], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(**{**batch, "input_ids": ids, "attention_mask": mask}, position_ids=position, use_cache=False)
        steps.append(out.logits[:, -1])
    return torch.stack(steps)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_vcd_equals_two_streams_read_again(family: str) -> None:
    model, batch = tiny.build(family), tiny.ragged_batch(family)
    with Plan("vcd(alpha=0.8,beta=0.2,step=700)").apply(model):
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": STEPS})
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    own = reading_again(model, batch, new)
    other = reading_again(model, {**batch, "pixel_values": noisy(batch["pixel_values"], 700)}, new)
    expected = (1 + 0.8) * own - 0.8 * other
    expected[own < own.amax(-1, keepdim=True) + math.log(0.2)] = -math.inf
    torch.testing.assert_close(torch.stack(out.logits), expected, rtol=0, atol=1e-5)


def test_the_second_stream_has_a_cache_of_its_own() -> None:
    """Other noise changes what is said from the second token on, too."""
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])
    found = []
    for seed in (0, 1):
        with Plan(f"vcd(alpha=0.05,beta=0.0001,seed={seed})").apply(model):
            found.append(logits(model, batch, max_new_tokens=4))
    assert torch.equal(found[0].argmax(-1)[:1], found[1].argmax(-1)[:1])
    assert (found[0] - found[1])[1].nan_to_num(0.0, 0.0, 0.0).abs().max() > 1e-3


def test_without_contrast_only_the_cut_is_left() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    stock = logits(model, batch)
    with Plan("vcd(alpha=0.0)").apply(model) as run:
        found = logits(model, batch)
    left = found.isfinite()
    assert torch.equal(found[left], stock[left])
    assert (~left).any()
    assert run.report().rows[0].visual_total == 16
    assert torch.equal(logits(model, batch), stock)


@pytest.mark.parametrize("plan", ["vcd", "fastv(layer=1,keep=0.5)+vcd+pai(first=1)"])
def test_rows_beams_and_drafts(plan: str) -> None:
    model, prompts = tiny.build("llava"), [tiny.prompt("llava", 1, 3, 6), tiny.prompt("llava", 1, 2, 3)]
    batch = tiny.collate("llava", prompts)
    with Plan(plan).apply(model):
        together = logits(model, batch)
        beams = model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)
        greedy = model.generate(**tiny.collate("llava", prompts[:1]), max_new_tokens=8, do_sample=False)
        lookup = model.generate(
            **tiny.collate("llava", prompts[:1]), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
        )
        assert torch.equal(greedy, lookup)
        for row, each in enumerate(prompts):
            alone = tiny.collate("llava", [each])
            torch.testing.assert_close(together[:, row], logits(model, alone)[:, 0], rtol=0, atol=1e-5)
            best = model.generate(**alone, max_new_tokens=5, num_beams=3, do_sample=False)
            assert torch.equal(beams[row, -5:], best[0, -5:])


@pytest.mark.parametrize("plan", ["vcd", "vhr", "pai(first=1)"])
def test_the_graph_engine_hands_back_what_it_cannot_run(plan: str) -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    found = []
    for engine in ("eager", "auto"):
        with Plan(plan).apply(model, engine=engine) as run:  # type: ignore[arg-type]
            found.append(model.generate(**batch, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)
    assert run.engine["name"] == "eager"  # type: ignore[index]


def test_refused() -> None:
    with pytest.raises(PlanError, match="a plan takes one"):
        Plan("vcd+vcd(seed=1)")
    with pytest.raises(PlanError, match="outside 0 to 999"):
        VCD(step=1000)
    with pytest.raises(PlanError, match="share of the largest"):
        VCD(beta=0.0)
    model = tiny.build("llava")
    one, two = (tiny.collate("llava", [tiny.prompt("llava", count, 3, 4)]) for count in (1, 2))
    with Plan("vcd").apply(model):
        with pytest.raises(ModelError, match="needs the default cache"):
            model.generate(**one, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        with pytest.raises(InputError, match="exactly one picture"):
            model.generate(**two, max_new_tokens=2, num_beams=2)
        model.generate(**one, max_new_tokens=2, do_sample=False)
