"""On a GPU: plans with modulations are recorded, prefill and decoding, and give what the attached executor gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.graph import engine_of, release
from mmefficient.models import adapter_for
from tests import tiny
from tests.graph.test_modulations import CASES, NEUTRAL, PLANS, run

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


def test_plans_in_turn_do_not_see_each_other() -> None:
    model, batch = on_gpu("llava", 3)
    want = {plan: run(model, batch, plan, "eager")[1] for plan in ("none", *PLANS)}
    for _ in range(3):
        for plan, logits in want.items():
            torch.testing.assert_close(run(model, batch, plan, "graph")[1], logits, rtol=0, atol=1e-4)
    release(model)
