"""Training under a plan: what it computes is what the plan computes, and a delta comes back as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaProcessor

from mmefficient.errors import ModelError, PlanError
from mmefficient.loading import load
from mmefficient.models import reference
from mmefficient.models.reference import adapt, finetune, train
from mmefficient.models.reference.data import IGNORE, Batches
from mmefficient.models.reference.planned import PlannedObjective
from mmefficient.models.reference.scenes.render import load_atlas
from mmefficient.models.reference.scenes.sample import Dice, sample_scene
from mmefficient.models.reference.scenes.splits import picture
from mmefficient.plan import Plan

LAYERS = 3


def small_model() -> Any:
    """The shipped model's first layers, float32."""
    model: Any = AutoModelForImageTextToText.from_pretrained(reference.path(), dtype=torch.float32)
    decoder = model.model.language_model
    decoder.layers = decoder.layers[:LAYERS]
    decoder.config.num_hidden_layers = LAYERS
    return model


@pytest.mark.parametrize(
    "plan",
    [
        "",
        "composite",
        "no_visual_self(scope=nothing)",
        "saisa",
        "modality_mutual",
        "window2d(radius=3)",
        "shortv(layers=(1,))",
    ],
)
def test_training_computes_what_the_plan_computes(plan: str) -> None:
    """Logits of every answer token in the training layout are those of single prompts under the plan."""
    processor = LlavaProcessor.from_pretrained(reference.path())
    model, parsed = small_model(), Plan(plan)
    adapt.attach(model, 2, projectors="saisa" in plan)
    torch.manual_seed(0)
    for parameter in (p for m in model.modules() if isinstance(m, adapt.LowRank) for p in (m.b,)):
        torch.nn.init.normal_(parameter, std=0.05)  # a delta that changes something
    single = not parsed.reusable
    assert single == ("mutual" in plan)
    data = Batches(processor, 1, 5, single=single)
    objective = PlannedObjective(
        model, processor, data, load_atlas(), torch.float32, finetune.layer_plans(parsed, model)
    )
    batch = {name: value[:1] for name, value in data[0].items()}
    with torch.no_grad():
        logits = objective.planned_logits(batch)
    model.eval()
    model.model.language_model.config._attn_implementation = "sdpa"
    image = picture(sample_scene(Dice("train/5/0/0")))
    checked = 0
    for slot in range(len(data.layout.slots))[:: 1 if single else 12]:
        start, size = data.layout.starts[slot], data.layout.slots[slot]
        at = batch["rows"][0][batch["labels"][0] != IGNORE].tolist()
        first = min(row for row in at if start <= row < start + size)
        ids = batch["tokens"][0, start : first + 1]  # the question; what follows is the answer
        inputs = processor(images=image, text=f"USER: <image>\n{processor.tokenizer.decode(ids)}", return_tensors="pt")
        with torch.no_grad(), parsed.apply(model):
            expected = model(**inputs).logits[0, -1]
        place = batch["rows"][0].tolist().index(first)
        torch.testing.assert_close(logits[0, place], expected, rtol=0, atol=5e-4)
        checked += 1
    assert checked >= (1 if single else 3)


def test_a_delta_comes_back(tmp_path: Path) -> None:
    """A few steps on the CPU change only what was attached, and loading the folder gives the trained logits."""
    out = tmp_path / "delta"
    options = {"batch_size": 1, "workers": 0, "device": "cpu", "compile_model": False, "single": True, "lr": 1e-2}
    train.main(out, steps=2, plan="saisa", **options)
    facts = json.loads((out / "delta.json").read_text())
    assert facts["plan"] == "saisa()"
    assert facts["steps"] == 2
    assert (out / "delta.safetensors").stat().st_size <= 3e6
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    model, processor = load(str(out), device="cpu", dtype="auto", attn_implementation=None)
    stock, _ = load("reference", device="cpu", dtype="auto", attn_implementation=None)
    changed = {n for n, p in stock.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == set(finetune.ATTENTION)
    assert len(model.model.layer_projectors) == len(stock.model.language_model.layers)
    own = stock.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(model.model.layer_projectors[0].linear_1.weight, own)
    with Plan("saisa").apply(model), torch.no_grad():
        inputs = processor(
            images=picture(sample_scene(Dice("a"))), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
        )
        assert model(**inputs).logits.isfinite().all()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="removes tokens"):
        finetune.layer_plans(Plan("fastv(layer=2)"), small_model())
    with pytest.raises(ModelError, match="no delta"):
        load("reference+nonsense", device="cpu", dtype="auto", attn_implementation=None)
    model = small_model()
    adapt.attach(model, 2)
    adapt.save(model, tmp_path)
    other = small_model()
    other.model.language_model.layers = other.model.language_model.layers[:1]
    with pytest.raises(ModelError, match="does not fit"):
        adapt.load(other, tmp_path)
    processor = LlavaProcessor.from_pretrained(reference.path())
    model = small_model()
    for plan in ("skip_ffn(layers=all)", "gna", "psa", "layer_drop(from_layer=2)"):
        plans = finetune.layer_plans(Plan(plan), model)
        with pytest.raises(PlanError, match="cannot be trained"):
            PlannedObjective(model, processor, Batches(processor, 1, 0), load_atlas(), torch.float32, plans)


def test_training_goes_on_from_a_delta(tmp_path: Path) -> None:
    model = small_model()
    adapt.attach(model, 2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    adapt.save(model, tmp_path)
    again = small_model()
    adapt.attach(again, 2)
    adapt.resume(again, tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-2, atol=1e-2)
    adapt.attach(other := small_model(), 3)
    with pytest.raises(ModelError, match="other parts"):
        adapt.resume(other, tmp_path)
