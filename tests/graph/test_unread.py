"""What nobody reads is not computed: tower layers behind the projector's, rows of decoder layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmefficient.graph import block, release, some_rows
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from tests import tiny


def generate(model: Any, plan: str, engine: Any, **options: Any) -> tuple[torch.Tensor, int]:
    """Ids of one call, and how often the last tower layer ran in it."""
    runs: list[int] = []
    batch = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 6), tiny.prompt("llava", 1, 5, 2)])
    last = adapter_for(model).tower_layers()[0][-1]
    handle = last.mlp.register_forward_hook(lambda *_: runs.append(1))
    try:
        with Plan(plan).apply(model, engine=engine):
            ids = model.generate(**batch, max_new_tokens=3, do_sample=False, **options)
    finally:
        handle.remove()
        release(model)
    return ids, len(runs)


@pytest.mark.parametrize(
    ("plan", "options", "runs"),
    [
        ("none", {}, 0),
        ("visionzip(dominant=0.4,contextual=0.2)", {}, 0),  # looks into the layer that the projector reads
        ("hiprune(keep=0.5,depth=1.0)", {}, 1),
        ("none", {"vision_feature_layer": -1}, 1),
    ],
)
def test_tower_layers_that_nobody_reads_are_not_run(plan: str, options: dict[str, Any], runs: int) -> None:
    model = tiny.build("llava")
    ids, found = generate(model, plan, "auto", **options)
    expected, stock = generate(model, plan, "eager", **options)
    assert (found, stock) == (runs, 1)
    assert torch.equal(ids, expected)
    assert not any("forward" in vars(layer) for layer in adapter_for(model).tower_layers()[0])


def test_what_somebody_put_in_place_of_a_tower_layer_runs() -> None:
    model = tiny.build("llava")
    layer = adapter_for(model).tower_layers()[0][-1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert generate(model, "none", "auto")[1] == 1


@pytest.mark.parametrize(
    ("plan", "rows"),
    [
        ("none", [26, 26, 26, 1]),
        ("fastv(layer=1,keep=0.25)", [14, 14, 14, 1]),  # its scores are the first layer's, whose other rows nobody sees
        ("fastv(layer=3,keep=0.25)", [26, 26, 14, 1]),
        ("exit(layer=2)", [26, 10, 10, 1]),
        ("pyramiddrop(shares=(0.6,0.4,0.2))", [26, 20, 16, 1]),  # looks at hidden states
    ],
)
def test_rows_that_nobody_reads_are_not_made(plan: str, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    feed = block.feed
    for module in (block, some_rows):
        monkeypatch.setattr(module, "feed", lambda layer, hidden: found.append(hidden.shape[1]) or feed(layer, hidden))
    generate(tiny.build("llava"), plan, "auto")
    assert found[: tiny.LAYERS] == rows
