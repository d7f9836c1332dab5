"""Every task on a fixture in its official file format; answers and values are worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmefficient.errors import InputError
from mmefficient.evaluation import Output, Record, Task, run_eval, tasks
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.report import PlanRun, build
from mmefficient.vlm import VLM

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def load(name: str, **options: Any) -> Task:
    return tasks.get(name, FIXTURES / name, **options)


def scores(task: Task, said: list[str], kind: str | None = None) -> dict[str, float]:
    records = [record for record in task.records(None, None) if kind in (None, record.kind)]
    ratios = task.kinds[records[0].kind].score(records, [Output(text) for text in said])
    with torch.no_grad():
        return {
            name: float(ratio.numerator.sum() / ratio.denominator.sum())
            for name, ratio in ratios.items()
            if ratio.denominator.sum()
        }


def test_every_task_with_data_has_a_fixture() -> None:
    assert {*NAMES, "scenes", "hallucination", "easy-vqa", "mmmu"} == set(tasks.NAMES)


# name -> (records, id, prompt, truth of the first record)
FIRST: dict[str, tuple[int, str, str, tuple[str, ...]]] = {
    "amber": (5, "1005", f"Is the sky sunny in this image?{SHORT}", ("yes",)),
    "chair": (3, "42", "Please describe this image in detail.", ("bus", "person", "traffic light")),
    "docvqa": (2, "49153", f"What is the ‘actual’ value per 1000, during the year 1975?{SHORT}", ("0.28",)),
    "gqa": (2, "201307251", f"Is it overcast?{SHORT}", ("no",)),
    "infovqa": (1, "98313", f"Which social platform has heavy female audience?{SHORT}", ("pinterest",)),
    "mmbench": (
        3,
        "241/0",
        "The passage below\ndescribes an experiment.\nIdentify the question that Madelyn and Tucker's experiment can "
        f"best answer.\nA. Does it slide further?\nB. Does it slide less?\n{LETTER}",
        ("B", "Does it slide further?", "Does it slide less?"),
    ),
    "mme": (28, "existence/000000006040.jpg/1", f"Is this the first question of existence?{SHORT}", ("yes",)),
    "pope": (8, "random/1", f"Is there a snowboard in the image?{SHORT}", ("yes",)),
    "scienceqa": (
        2,
        "4",
        "Which of these states is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma\n" + LETTER,
        ("A", "West Virginia", "Louisiana", "Arizona", "Oklahoma"),
    ),
    "seedbench": (
        2,
        "101669",
        f"How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}",
        ("A", "One", "Two", "Three", "Four"),
    ),
    "textvqa": (
        2,
        "34602",
        f"what is the brand of this camera?{SHORT}",
        (
            *("nous les gosses", "dakota", "clos culombu", "dakota digital", "dakota"),
            *("dakota", "dakota digital", "dakota digital", "dakota", "dakota"),
        ),
    ),
    "vizwiz": (
        2,
        "VizWiz_val_00000000.jpg",
        "Ok. There is another picture I hope it is a better one.\nWhen the provided information is insufficient, "
        f"respond with 'Unanswerable'.{SHORT}",
        ("unanswerable",) * 8 + ("unsuitable",) * 2,
    ),
    "vqav2": (
        3,
        "262148000",
        f"Where is he looking?{SHORT}",
        ("down",) * 5 + ("at table",) * 3 + ("skateboard",) * 2,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_records_of_the_official_files(name: str) -> None:
    task = load(name)
    records = task.records(None, None)
    count, key, prompt, truth = FIRST[name]
    assert (len(records), records[0].id, records[0].question, records[0].truth) == (count, key, prompt, truth)
    pictures = task.pictures(records, torch.device("cpu"))
    assert all(isinstance(picture, Image.Image) and picture.size == (8, 8) for picture in pictures)
    assert len({record.id for record in records}) == count
    facts = task.facts()
    assert facts["skipped"] == 0
    assert all(len(digest) == 16 for digest in facts["files"].values())


# name, kind, answers in order, some of the metrics
GOLDEN: list[tuple[str, str | None, list[str], dict[str, float]]] = [
    (
        "pope",
        "random",
        ["Yes", "Yes", "No", "no"],
        {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "mcc": 0},
    ),
    ("pope", "popular", ["Yes, it is", "No"], {"accuracy": 1, "f1": 1, "mcc": 1, "yes_rate": 0.5}),
    # 42: people, traffic light right, dog wrong; 73: dog right, bed wrong; 74: nothing named, nothing there
    (
        "chair",
        None,
        ["Two men at a traffic light, with a dog.", "A puppy on a bed.", "Nothing but grass."],
        {"chair_s": 2 / 3, "chair_i": 2 / 5, "recall": 3 / 5},
    ),
    # 3 of 10 say "at table"; normalised "Two" is 9 of 10; all ten agree, so "No." is not normalised
    (
        "vqav2",
        None,
        ["at table.", "Two", "No."],
        {"accuracy": (0.9 + 1 + 0) / 3, "accuracy[other]": 0.9, "accuracy[number]": 1, "accuracy[yes-no]": 0},
    ),
    ("gqa", None, ["No.", "the woman"], {"accuracy": 0.5, "accuracy[verify]": 1, "accuracy[query]": 0}),
    ("textvqa", None, ["Dakota Digital", "Copenhagen?"], {"accuracy": (0.9 + 1) / 2}),
    ("vizwiz", None, ["unsuitable", "can of soup"], {"accuracy": (0.6 + 1) / 2, "accuracy[unanswerable]": 0.6}),
    ("scienceqa", None, ["A. West Virginia", "A"], {"accuracy": 0.5, "accuracy[social science]": 1}),
    ("mme", "existence", ["Yes.", "no"], {"score": 2, "accuracy": 1, "accuracy_plus": 1}),
    ("mme", "OCR", ["Yes", "yes"], {"score": 0.5, "accuracy": 0.5, "accuracy_plus": 0}),
    ("mmbench", None, ["B", "plum", "(C)"], {"accuracy": 2 / 3, "unparsed": 0, "accuracy[object_localization]": 1}),
    ("seedbench", None, ["A", "C"], {"accuracy": 0.5, "accuracy[Instances Counting]": 1}),
    # No is positive: said No to 1005 (yes), 5769 (no), 13558 (no)
    (
        "amber",
        None,
        ["No", "No", "Yes", "Yes", "no"],
        {
            "accuracy": 3 / 5,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "f1": 2 / 3,
            "accuracy[relation]": 1,
            "f1[existence]": 0,
        },
    ),
    ("docvqa", None, ["0.29", "University of California"], {"anls": (0.75 + 1) / 2, "exact": 0.5}),
    ("infovqa", None, ["Twitter"], {"anls": 0}),
]


@pytest.mark.parametrize(("name", "kind", "said", "expected"), GOLDEN)
def test_metrics_equal_those_computed_by_hand(
    name: str, kind: str | None, said: list[str], expected: dict[str, float]
) -> None:
    values = scores(load(name), said, kind)
    assert {key: values[key] for key in expected} == pytest.approx(expected)


def test_the_golden_values_cover_every_task() -> None:
    assert {name for name, *_ in GOLDEN} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "variant", "prompt"),
    [
        ("pope", "vcd", "Is there a snowboard in the image? Please answer this question with one word."),
        ("pope", "vaf", "Is there a snowboard in the image? Please just answer yes or no."),
        ("pope", "plain", "Is there a snowboard in the image?"),
        ("chair", "pai", "Please help me describe the image in detail."),
        ("mme", "official", "Is this the first question of existence? Please answer yes or no."),
        ("amber", "official", "Is the sky sunny in this image?"),
        (
            "scienceqa",
            "cqm",
            "Context: N/A\nQuestion: Which of these states is farthest north?\n"
            "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma",
        ),
        ("textvqa", "llava-ocr", f"what is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL{SHORT}"),
    ],
)
def test_variants(name: str, variant: str, prompt: str) -> None:
    task, usual = load(name, variant=variant), load(name)
    assert task.records(None, None)[0].question == prompt
    assert task.facts()["variant"] == variant
    assert task.facts()["prompt_sha256"] != usual.facts()["prompt_sha256"]


def test_length_variants_of_chair() -> None:
    limits = {
        name: load("chair", variant=name).kinds["caption"].max_new_tokens for name in ("opera", "opera-64", "ad-hh")
    }
    assert limits == {"opera": 512, "opera-64": 64, "ad-hh": 128}


def test_circular_mmbench_turns_every_item() -> None:
    task = load("mmbench", variant="circular")
    records = task.records(None, None)
    assert [record.id for record in records] == [
        *(f"241/{turn}" for turn in range(2)),
        *(f"252/{turn}" for turn in range(3)),
        *(f"253/{turn}" for turn in range(4)),
    ]
    fruit = {record.id: record for record in records}["252/1"]
    assert fruit.question == f"Which fruit is shown?\nA. pear\nB. plum\nC. apple\n{LETTER}"
    assert fruit.truth == ("B", "pear", "plum", "apple")
    right = [record.truth[0] for record in records]
    assert scores(task, right)["circular"] == 1
    assert scores(task, [*right[:-1], "?"])["circular"] == pytest.approx(2 / 3)
    assert task.facts()["left_out"] == {"rotation in the table (the circular variants make their own)": 1}


def test_a_picture_may_be_that_of_another_row_of_mmbench() -> None:
    task = load("mmbench")
    *_, fruit, colour = task.pictures(task.records(None, None), torch.device("cpu"))
    assert np.array_equal(np.asarray(fruit), np.asarray(colour))


def test_what_is_left_out_is_counted() -> None:
    assert load("seedbench").facts()["left_out"] == {"question about a video": 1}
    assert load("scienceqa").facts()["left_out"] == {"question without a picture": 1}


def test_chair_takes_its_own_500_or_a_list(tmp_path: Path) -> None:
    for name in ("annotations", "val2014"):
        (tmp_path / name).symlink_to(FIXTURES / "chair" / name)

    def ids() -> list[str]:
        return [record.id for record in tasks.get("chair", tmp_path).records(None, None)]

    assert ids() == ["42", "73", "74"]  # by sha256: 73475cb4…, 96061e92…, eb624dbe…
    (tmp_path / "image_ids.txt").write_text("74\n42\n")
    assert ids() == ["74", "42"]
    assert "image_ids.txt" in tasks.get("chair", tmp_path).facts()["files"]
    (tmp_path / "image_ids.txt").unlink()
    (tmp_path / "image_ids.json").write_text("[73]")
    assert ids() == ["73"]
    (tmp_path / "image_ids.json").write_text("[73, 5]")
    with pytest.raises(InputError, match=r"image_ids.json, image 5: no instance file knows this picture"):
        ids()


def test_easy_vqa_is_that_of_the_package() -> None:
    pytest.importorskip("easy_vqa")
    from easy_vqa import get_test_questions

    task = tasks.get("easy-vqa")
    records = task.records(None, None)
    texts, answers, images = get_test_questions()
    assert [record.question for record in records] == texts
    assert [record.truth for record in records] == [(answer,) for answer in answers]
    assert [record.picture for record in records] == [f"{image}.png" for image in images]
    assert {record.category for record in records} == {"yes-no", "shape", "colour"}
    assert task.pictures(records[:1], torch.device("cpu"))[0].size == (64, 64)
    assert tasks.get("easy-vqa", variant="llava").records(None, 1)[0].question == texts[0] + SHORT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs annotation files: give data"),
        ({"data": FIXTURES / "nowhere"}, "There is no folder .*nowhere"),
        ({"data": FIXTURES / "gqa"}, r"gqa lacks \*_pope_random.json or .* which the task pope needs"),
        ({"data": FIXTURES / "pope", "variant": "llama"}, 'no variant "llama"; choose from: llava, plain, vcd, vaf'),
    ],
)
def test_bad_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tasks.get("pope", **options)


@pytest.mark.parametrize("options", [{"data": "x"}, {"variant": "x"}, {"skip_bad": True}])
def test_a_task_with_its_own_records_takes_no_data(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="brings its own records"):
        tasks.get("scenes", **options)


def test_a_run_reports_its_data(vlm: VLM) -> None:
    report = run_eval("pope", [], vlm, data=FIXTURES / "pope", variant="plain", limit=4, resamples=10)
    settings = report["settings"]
    assert settings["variant"] == "plain"
    assert settings["prompt"] == "{question}"
    assert settings["files"].keys() == {f"coco_pope_{kind}.json" for kind in ("random", "popular", "adversarial")}
    assert settings["hashes"].keys() == {"images", "prompts", "settings"}
    other = run_eval("pope", [], vlm, data=FIXTURES / "pope", variant="vcd", limit=4, resamples=10)["settings"]
    assert other["hashes"]["images"] == settings["hashes"]["images"]
    assert other["hashes"]["prompts"] != settings["hashes"]["prompts"]


def test_records_of_one_kind_and_a_limit() -> None:
    task = load("mme")
    records: list[Record] = task.records(["OCR", "count"], 1)
    assert [record.kind for record in records] == ["count", "OCR"]


def test_the_hallucination_subset_of_mme_sums_to_at_most_800() -> None:
    """Existence and colour all right, one answer everywhere for count and position: 200 + 200 + 50 + 50."""
    task = load("mme")
    assert task.groups["hallucination"] == ("existence", "count", "position", "color")
    records = task.records(task.groups["hallucination"], None)
    always = {"count": "no", "position": "yes"}
    said = [Answer(r.id, always.get(r.kind, r.truth[0]), False, [1], 1, 1.0, 1.0) for r in records]
    settings = {"digest": ""}
    report = build(task, records, [PlanRun("none", said)], settings=settings, environment={}, resamples=2, seed=0)
    found = report["plans"][0]["metrics"]
    assert 4 * 100 * found["hallucination/score"]["value"] == 500
    assert found["hallucination/accuracy_plus"]["value"] == 0.5
