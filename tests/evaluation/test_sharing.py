from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmefficient.evaluation import Record, Task
from mmefficient.evaluation.generation import Asker
from mmefficient.evaluation.sharing import Batch, Batches, SharedPictures
from mmefficient.plan import Plan
from mmefficient.vlm import VLM
from tests.tiny_checkpoint import save

FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl"]
PLANS = ["none", "grid(keep=4)", "fastv(layer=1,keep=0.5)", "visionzip(dominant=3,contextual=1)"]


def shared(records: list[Record], task: Task, vlm: VLM, plan: str) -> tuple[list[str], int, list[list[int]]]:
    asker = Asker(vlm.model, vlm.processor, task)
    seen: list[int] = []
    tower = vlm.model.base_model.vision_tower if hasattr(vlm.model.base_model, "vision_tower") else vlm.model.base_model
    handle = getattr(tower, "visual", tower).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else next(iter(kwargs.values())))), with_kwargs=True
    )
    with asker.under(Plan(plan)) as run:
        answers = asker.ask(records, run)
    handle.remove()
    return [answer.text for answer in answers], sum(seen), [answer.kept for answer in answers]


@pytest.mark.parametrize("plan", PLANS)
def test_a_shared_picture_is_encoded_once_and_answered_as_if_not(task: Task, vlm: VLM, plan: str) -> None:
    records = task.records(["existence"], None)  # seven questions on four pictures
    together, encoded, kept = shared(records, task, vlm, plan)
    alone = [shared([record], task, vlm, plan) for record in records]
    assert together == [texts[0] for texts, _, _ in alone]
    assert kept == [rows[0] for _, _, rows in alone]
    assert encoded == (7 if "visionzip" in plan else 4)  # methods that look into the tower need a row per question
    assert "get_image_features" not in vars(vlm.model.base_model)


def test_plans_share_inputs_and_features_and_are_charged_alike(task: Task, vlm: VLM) -> None:
    records, made = task.records(["existence"], None), 0

    def pictures(*args: Any) -> Any:
        nonlocal made
        made += 1
        time.sleep(0.1)
        return task.pictures(*args)

    asker = Asker(vlm.model, vlm.processor, dataclasses.replace(task, pictures=pictures))
    tower: list[int] = []

    def slow(*_: Any) -> None:
        time.sleep(0.1)
        tower.append(1)

    handle = vlm.model.base_model.vision_tower.register_forward_hook(slow)
    charged = []
    for plan in PLANS:
        with asker.under(Plan(plan)) as run:
            answers = asker.ask(records, run)
        charged.append({name: answers[0].ms[name] for name in ("preprocess", "vision")})
        assert [answer.text for answer in answers] == shared(records, task, vlm, plan)[0]
    handle.remove()
    assert made == 1
    assert sum(tower) - len(PLANS) == 2  # `shared` ran it for every plan; here "none" and "visionzip" did
    for each in charged:  # the first plan spends the time, the others are charged with it
        assert min(each.values()) >= 100 / len(records)


def test_what_is_held_for_later_plans_is_bounded() -> None:
    batches, batch = Batches(limit=1000), Batch(["p"], {"pixel_values": torch.zeros(100)}, None, {})
    batches.keep(["a"], batch)
    batches.keep(["b"], Batch(["p"], {"pixel_values": torch.zeros(200)}))  # no room
    assert batches.get(["a"], ["p"]) is batch
    assert batches.get(["b"], ["p"]).inputs is None
    batch.features = object, torch.zeros(100)  # the tower was asked only now
    batches.keep(["a"], batch)
    batches.keep(["c"], Batch(["p"], {"pixel_values": torch.zeros(60)}))
    assert batches.get(["c"], ["p"]).inputs is None


def test_pixels_that_a_method_made_are_encoded_anew(vlm: VLM) -> None:
    made = torch.rand(2, 3, 16, 16)
    batch = Batch(["p", "p"], {"pixel_values": torch.rand(2, 3, 16, 16)}, ms={"preprocess": 1.0})
    with SharedPictures(vlm.model, Plan()) as sharing:
        sharing.coming(batch)
        own = vlm.model.base_model.get_image_features(batch.inputs["pixel_values"]).pooler_output
        other = vlm.model.base_model.get_image_features(made).pooler_output
        again = vlm.model.base_model.get_image_features(batch.inputs["pixel_values"]).pooler_output
    assert all(map(torch.equal, own, again))
    assert not torch.equal(own[0], other[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_the_same(family: str, task: Task, tmp_path: Path) -> None:
    vlm = VLM.from_pretrained(save(tmp_path, family), device="cpu", dtype="float32")
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if parameter.ndim > 1:
                parameter *= 8
    records = task.records(["existence"], None)
    together = shared(records, task, vlm, "random(keep=0.5)")[0]
    assert together == [shared([record], task, vlm, "random(keep=0.5)")[0][0] for record in records]


def test_vision_time_is_that_of_one_picture(task: Task, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmefficient.evaluation.generation as generation

    class Timer(generation.StageTimer):
        def __exit__(self, *args: Any) -> None:
            super().__exit__(*args)
            self.stages_ms = {"vision": 28.0, "prefill": 28.0}

    monkeypatch.setattr(generation, "StageTimer", Timer)
    asker = Asker(vlm.model, vlm.processor, task)
    with asker.under(Plan()) as run:
        answer = asker.ask(task.records(["existence"], None), run)[0]
    assert answer.ms == {"vision": 7.0, "prefill": 4.0}
