"""On a GPU: recorded programs generate what the model generates, and a model that can be recorded says nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.graph import release
from mmefficient.plan import Plan
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PLANS = ["none", "fastv(layer=2,keep=0.5)", "pool(keep=0.3)", "exit(layer=2)", "random(keep=0.5)"]
TOWER = ["visionzip(dominant=0.4,contextual=0.2)", "fastervlm(keep=0.4)", "vispruner(keep=0.4,important=0.5)"]
CASES = [(family, plan) for family in tiny.FAMILIES for plan in PLANS + (TOWER if family != "qwen2_5_vl" else [])]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_recorded_ids_are_those_of_eager(family: str, plan: str, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny.build(family).cuda()
    prompts = tiny.ragged_prompts(family)
    options = {"max_new_tokens": 6, "do_sample": False}
    for batch in (tiny.collate(family, prompts), tiny.collate(family, prompts[:1])):
        batch = {name: value.cuda() for name, value in batch.items()}
        with Plan(plan).apply(model) as run:
            want = model.generate(**batch, **options)
            report = run.report()
        with Plan(plan).apply(model, engine="auto") as run:
            for _ in range(4):
                assert torch.equal(model.generate(**batch, **options), want)
                assert run.report() == report
    held = run.report().engine
    assert held["name"] == "graph"
    assert held["recordings"] >= (4 if family == "qwen2_5_vl" else 6), caplog.text
    release(model)
