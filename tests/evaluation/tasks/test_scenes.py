from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor

from mmefficient.evaluation import Output, Record, run_eval, tasks
from mmefficient.evaluation.task import digest
from mmefficient.models.reference.scenes.splits import KINDS, Question, load
from mmefficient.vlm import VLM

TASK = tasks.get("scenes")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return TASK.records(None, 12)


def source(record: Record) -> Question:
    assert isinstance(record.source, Question)
    return record.source


def test_every_kind_of_the_split_is_asked(records: list[Record]) -> None:
    assert tuple(TASK.kinds) == KINDS
    assert [record.id for record in records] == [question.id for question in load("test", None, 12)]
    assert set(TASK.groups["mean"]) == set(KINDS) - {"caption"}


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_get_full_marks(records: list[Record], kind: str) -> None:
    asked = [record for record in records if record.kind == kind]
    ratios = TASK.kinds[kind].score(asked, [Output(source(record).answer) for record in asked])
    values = {name: ratio.numerator.sum() / ratio.denominator.sum() for name, ratio in ratios.items()}
    if kind == "caption":
        assert (values["chair_s"], values["chair_i"], values["recall"]) == (0, 0, 1)
    else:
        assert values["accuracy"] == 1
    if kind.startswith("existence"):
        assert (values["f1"], values["yes_rate"], values["vague"]) == (1, 0.5, 0)


def test_a_caption_of_another_picture_hallucinates(records: list[Record]) -> None:
    captions = [record for record in records if record.kind == "caption"]
    ratios = TASK.kinds["caption"].score(captions[1:], [Output(source(record).answer) for record in captions[:-1]])
    assert ratios["chair_i"].numerator.sum() > 0
    assert ratios["recall"].numerator.sum() < ratios["recall"].denominator.sum()


def test_pictures_are_those_of_the_questions(records: list[Record]) -> None:
    chosen = [*records[:4], *records[::17]]
    pictures = TASK.pictures(chosen, torch.device("cpu"))
    assert isinstance(pictures, torch.Tensor)
    assert pictures.dtype == torch.uint8
    for picture, record in zip(pictures, chosen, strict=True):
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), np.asarray(source(record).image()))


def test_a_picture_reaches_the_model_without_resizing(records: list[Record]) -> None:
    """The processor takes rendered tensors as they are, and gives what it gives for the picture as an image."""
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    picture = torch.as_tensor(TASK.pictures(records[:1], torch.device("cpu")))[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    for image in (picture, source(records[0]).image()):
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(pixels, (picture / 255 - mean) / std, atol=1e-6)


def test_pictures_are_told_apart_by_content(records: list[Record]) -> None:
    by_picture: dict[str, set[object]] = {}
    for record in records:
        by_picture.setdefault(record.picture, set()).add(source(record).scene)
    assert all(len(scenes) == 1 for scenes in by_picture.values())
    assert len(by_picture) < len(records), "kinds share pictures"
    assert len({digest(records), digest(records[:-1]), digest(TASK.records(["count"], 2))}) == 3


def test_scenes_run_from_end_to_end(vlm: VLM) -> None:
    report = run_eval("scenes", ["exit(layer=2)"], vlm, limit=2 * len(KINDS), batch_size=3, resamples=10)
    for plan in report["plans"]:
        kinds = {name.rpartition("/")[0] for name in plan["metrics"]}
        assert kinds == {*KINDS, "mean", "existence"}
        assert plan["questions"] == 2 * len(KINDS)
    assert report["plans"][1]["paired"].keys() == report["plans"][0]["metrics"].keys()
