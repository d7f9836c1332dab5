from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmefficient.evaluation import Record, Task
from mmefficient.evaluation.generation import Asker
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
