"""On a GPU: plans with modulations are recorded, prefill and decoding, and give what the attached executor gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.graph import engine_of, release
from mmefficient.models import adapter_for
from tests import tiny
from tests.graph.test_modulations import CASES, NEUTRAL, PLANS, Forcing, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(family: str, rows: int) -> tuple[Any, dict[str, Any]]:
    """A model and the first of its ragged prompts."""
    batch = tiny.collate(family, tiny.ragged_prompts(family)[:rows])
    return tiny.build(family).cuda(), {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_recorded_logits_are_those_of_eager(family: str, plan: str, caplog: pytest.LogCaptureFixture) -> None:
    for rows in (3, 1):
        model, batch = on_gpu(family, rows)
        ids, logits, report = run(model, batch, plan, "eager")
        for _ in range(4):
            ours, our_logits, our_report = run(model, batch, plan, "auto")
            torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)
            assert torch.equal(ours, ids)
            assert our_report == report
        found = {key[0][0] for key in engine_of(model, adapter_for(model)).captures._found}
        assert found >= {"read", "step"}, caplog.text
        release(model)


@pytest.mark.parametrize("plan", NEUTRAL)
def test_neutral_settings_are_the_engine_without_plan(plan: str) -> None:
    model, batch = on_gpu("llava", 3)
    stock = run(model, batch, "none", "graph")[1]
    for _ in range(3):
        torch.testing.assert_close(run(model, batch, plan, "graph")[1], stock, rtol=0, atol=1e-4)
    release(model)


STEADY = [plan for plan in PLANS[:8] if "tau=1.6" not in plan]  # there a sink is one by a rounding error


@pytest.mark.parametrize("plan", ["none", *STEADY])
def test_bfloat16_is_as_near_to_float32_as_eager_is(plan: str) -> None:
    """Of a model whose programs were recorded in float32 before."""
    model, batch = on_gpu("llava", 3)
    for _ in range(2):
        ids, exact, _ = run(model, batch, plan, "graph")
    said = ids[:, -len(exact) :]
    model.bfloat16()
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    eager = run(model, batch, plan, "eager", Forcing(said))[1].float()
    for _ in range(3):
        ours = run(model, batch, plan, "graph", Forcing(said))[1].float()
        assert (ours - exact).abs().mean() < 1.5 * (eager - exact).abs().mean() + 1e-3
    release(model)


def test_plans_in_turn_do_not_see_each_other() -> None:
    model, batch = on_gpu("llava", 3)
    want = {plan: run(model, batch, plan, "eager")[1] for plan in ("none", *PLANS)}
    for _ in range(3):
        for plan, logits in want.items():
            torch.testing.assert_close(run(model, batch, plan, "graph")[1], logits, rtol=0, atol=1e-4)
    release(model)
