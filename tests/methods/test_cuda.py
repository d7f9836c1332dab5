"""On a GPU: methods without kernels of their own give what they give on a CPU, attached and on the graph engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.graph import release
from mmefficient.plan import Plan
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLANS = [
    "psa(levels=(0,0.4,0.3,0),block=8)",
    "gna(window=2,stride=2,bidirectional=True)",
    "fastv(layer=1,keep=0.5)+layer_drop(from_layer=2)",
    "visual_heads(mask=((1,0),(3,2)))",
    "visual_heads(mask=((1,0),(2,1)),form=renormalised)",
    "lift(gain=1.4)+dola(early=low)",
]


def logits(model: Any, batch: dict[str, Any], plan: str, engine: str) -> torch.Tensor:
    """Of three greedy steps, [3, B, V], on the CPU."""
    with Plan(plan).apply(model, engine=engine):
        found = model.generate(
            **batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(found.logits).cpu()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_those_of_the_cpu(family: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.build(family), tiny.ragged_batch(family)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # patch embeddings are convolutions
    want = logits(model, batch, plan, "eager")
    model.cuda()
    moved = {name: value.cuda() for name, value in batch.items()}
    for engine in ("eager", "auto", "auto", "auto"):  # as it is, recorded, replayed
        torch.testing.assert_close(logits(model, moved, plan, engine), want, rtol=0, atol=1e-4)
    release(model)
