"""Plans with modulations on the graph engine: logits and ids are those of the attached executor (fp32)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from mmefficient.errors import ModelError
from mmefficient.graph.steered import Kept, Place, moved
from mmefficient.methods.modulations.vhr import VHR
from mmefficient.modulation import Change
from mmefficient.steered import Part
from tests import tiny
from tests.graph.test_engine import generate, recording

STEPS = 9
PLANS = [
    "pai(alpha=0.4)",
    "vaf(first=1,last=2)",
    "var(p=0.3,rho=0.4,tau=1.6)",
    "var(p=0.3,rho=0.4,tau=1.0,dims=(3,7))",
    "spin(keep=0.5,factor=0.3)",
    "act(beta=0.3,theta=0.04)",
    "adhh(theta=0.2,heads=((1,0),(1,3),(3,2)))",
    "vhr(alpha=1.7,deep=0.5)",
    "paint(alpha=0.9,beta=0.5,local=0.5,first=1)+lift(gain=1.3)",
    "fastv(layer=2,keep=0.5)+pai(alpha=0.4)",
    "pool(keep=0.3)+vhr(alpha=1.7)+spin(keep=0.5)+vaf(first=1,last=2)",
    "vhr(alpha=1.7)+skip_ffn(layers=(0,))",
    "exit(layer=2)+vhr(alpha=1.7)+var(p=0.3,rho=0.4,tau=1.6)",
]
HEADS = [
    "visual_heads(mask=((1,0),(3,2)))",
    "visual_heads(mask=((1,0),(2,1)),form=renormalised)+pai(alpha=0.4)",
]
CASES = [("llava", plan) for plan in HEADS]
CASES += [(family, plan) for family in tiny.FAMILIES for plan in PLANS if family != "qwen2_5_vl" or "paint" not in plan]


class Noting(LogitsProcessor):
    """Keeps the logits of every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        return scores


class Forcing(Noting):
    """The same, and makes the model say `ids` [B, steps]."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = self.ids[:, len(self.seen), None]
        return torch.full_like(super().__call__(input_ids, scores), -torch.inf).scatter(1, said, 0.0)


def run(
    model: Any, batch: dict[str, Any], plan: str, engine: str, noting: Noting | None = None
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Ids, logits [steps, B, V] and the report."""
    noting = noting or Noting()
    ids, report = generate(model, batch, plan, engine, max_new_tokens=STEPS, logits_processor=[noting])
    return ids, torch.stack(noting.seen), report


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_logits_and_report_are_those_of_eager(family: str, plan: str) -> None:
    model = tiny.build(family)
    engine = recording(model)
    prompts = tiny.ragged_prompts(family)
    batch = tiny.collate(family, prompts)
    assert (run(model, batch, plan, "eager")[1] - run(model, batch, "none", "eager")[1]).abs().max() > 1e-4
    for batch in (tiny.collate(family, prompts), tiny.collate(family, prompts[:1])):
        ids, logits, report = run(model, batch, plan, "eager")
        for _ in range(3):  # as it is, recorded, replayed
            ours, our_logits, our_report = run(model, batch, plan, "auto")
            torch.testing.assert_close(our_logits, logits, rtol=0, atol=2e-5)
            assert torch.equal(ours, ids)
            assert our_report == report
    assert our_report.engine["name"] == "graph"
    assert len(engine.captures) >= 4


NEUTRAL = ["pai(alpha=0.0,first=0)", "vaf(enhance=1.0,suppress=1.0,first=0,last=-1)", "vhr(alpha=1.0)"]
NEUTRAL += ["var(p=1.0,tau=1.5)", "spin(factor=1.0)", "adhh(theta=1.1,heads=((2,1),))"]


@pytest.mark.parametrize("plan", NEUTRAL)
def test_neutral_settings_are_the_engine_without_plan(plan: str) -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    _, stock, _ = run(model, batch, "none", "auto")
    _, found, report = run(model, batch, plan, "auto")
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-5)
    assert report.engine["name"] == "graph"


@pytest.mark.parametrize("plan", ["var(p=0.3,rho=0.4,tau=1.6)", "vhr(alpha=1.7)", "paint(first=1)+spin(keep=0.5)"])
def test_a_recording_serves_other_prompts_and_keeps_nothing_of_the_last(plan: str) -> None:
    model = tiny.build("llava")
    engine = recording(model)
    prompts = [tiny.prompt("llava", 1, before, after) for before, after in ((3, 4), (5, 6), (4, 3), (7, 4), (3, 4))]
    for each in prompts:
        batch = tiny.collate("llava", [each])
        _, found, _ = run(model, batch, plan, "auto")
        torch.testing.assert_close(found, run(model, batch, plan, "eager")[1], rtol=0, atol=2e-5)
    kinds = [key[0][0] for key in engine.captures._found]
    assert kinds.count("read") <= 2
    assert kinds.count("step") == 1


def test_text_alone_is_not_modulated() -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 0, 3, 4)])
    found = [run(model, batch, plan, "auto")[1] for plan in ("none", "vhr+pai(alpha=0.4)")]
    assert torch.equal(*found)


def test_what_waits_for_the_device_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VHR, "recordable", False)
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    assert run(model, batch, "vhr", "auto")[2].engine["why"] == "vhr cannot be recorded"


def test_kept_facts_come_back_and_hidden_tensors_are_refused() -> None:
    scores, gain = torch.randn(2, 3), torch.rand(2, 4, 1)

    def other(extra: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return extra

    part = Part("all", Change(logit_map=scores, gain=partial(other, gain)))
    kept = Kept("plan", {1: (part,), 3: (part,)}, [8] * 4)
    assert kept.facts.numel() % 16 == 0
    assert len(set(kept.key[1])) == 2
    again = kept.at(kept.facts.clone())
    assert list(again) == [1, 3]
    assert torch.equal(again[3][0].change.logit_map, scores)  # type: ignore[arg-type]
    assert torch.equal(again[1][0].change.gain(scores), gain)  # type: ignore[operator,misc]
    assert Kept("plan", {0: (Part("all", Change()),)}, [8]).facts.numel() == 0
    assert Place(16, (2, 3), torch.float32).end == 40
    with pytest.raises(ModelError, match="make it a functools"):
        moved(Part("all", Change(gain=lambda query: gain)), lambda x: x, lambda x: x)
