"""An empty plan changes nothing, and leaving any plan restores everything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mmefficient.errors import ModelError, PlanError
from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import GREEDY, logits

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "output_scores": True, "output_logits": None},
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("way", MODES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_empty_plan_is_bit_identical(family: str, way: str, implementation: str) -> None:
    model, batch = tiny.build(family, implementation), tiny.ragged_batch(family)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        out = model.generate(**batch, **{**GREEDY, **MODES[way]})
        return out.sequences, torch.stack(out.logits or out.scores)

    sequences, numbers = run()
    with Plan().apply(model) as attached:
        inside = run()
    assert torch.equal(sequences, inside[0])
    assert torch.equal(numbers, inside[1])
    rows = attached.report().rows
    assert all(row.kept_per_layer == [row.visual_total] * tiny.LAYERS for row in rows)
    assert rows[-1].visual_total > 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_everything_is_bit_identical(family: str) -> None:
    model, batch = tiny.build(family), tiny.ragged_batch(family)
    plain = logits(model, batch)
    with Plan("random(keep=1.0)+fastv(layer=1,keep=1.0)").apply(model):
        assert torch.equal(plain, logits(model, batch))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_leaving_restores_the_model(family: str, fails: bool) -> None:
    model, batch = tiny.build(family), tiny.ragged_batch(family)
    plan = "random(keep=0.5)" if family == "qwen2_5_vl" else "visionzip(dominant=0.3,contextual=0.1)"
    plan += "+fastv(layer=1)"
    plain, before = logits(model, batch), fingerprint(model)
    try:
        with Plan(plan).apply(model):
            assert not torch.allclose(plain, logits(model, batch))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert fingerprint(model) == before
    assert torch.equal(plain, logits(model, batch))


def fingerprint(model: torch.nn.Module) -> list[Any]:
    """Hooks, instance attributes and attention implementations of all modules."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = {kind: str(value) for kind, value in module.__dict__.items() if "hooks" in kind and value}
        config = getattr(module, "config", None)
        found.append((name, hooks, sorted(module.__dict__), getattr(config, "_attn_implementation", None)))
    return found


def test_an_error_inside_the_model_leaves_nothing_behind() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    plain, before = logits(model, batch), fingerprint(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("inside a layer")

    layer = model.get_decoder().layers[2]
    with Plan("fastv(layer=1)").apply(model):
        logits(model, batch)
        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside a layer"):
            logits(model, batch)
        handle.remove()
    assert fingerprint(model) == before
    assert torch.equal(plain, logits(model, batch))
    with Plan("fastv(layer=1)").apply(model):
        logits(model, batch)


def test_a_plan_that_cannot_be_put_on_leaves_nothing_behind() -> None:
    """tome is refused while it is being attached, when other parts of the plan are on the model already."""
    model = tiny.build("llava")
    before = fingerprint(model)
    with pytest.raises(PlanError, match="halve"), Plan("tome(keep=0.25)").apply(model):
        pass
    assert fingerprint(model) == before
    with Plan("visionzip(dominant=3,contextual=1)").apply(model):
        logits(model, tiny.ragged_batch("llava"))


def test_a_foreign_wrapper_survives() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    stock, calls = model.model.get_image_features, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    counted.__wrapped__ = stock  # type: ignore[attr-defined]
    model.model.get_image_features = counted
    with Plan("random(keep=0.5)").apply(model):
        logits(model, batch)
    assert calls == [1]
    assert model.model.get_image_features is counted


def test_second_plan_is_refused() -> None:
    model = tiny.build("llava")
    second = Plan().apply(model)
    with Plan("random()").apply(model), pytest.raises(ModelError, match="already carries a plan"):
        second.__enter__()
    with Plan("random()").apply(model):
        pass


def test_deepcopy_inside_a_plan_is_independent() -> None:
    model, batch = tiny.build("llava_next"), tiny.ragged_batch("llava_next")
    with Plan("visionzip(dominant=0.3,contextual=0.1)+fastv(layer=1)").apply(model) as run:
        pruned = logits(model, batch)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(pruned, logits(twin, batch))
        report = run.report()
    assert report.rows[0].kept_per_layer[-1] < report.rows[0].visual_total
