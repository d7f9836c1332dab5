"""Hub copies of data sets, as local folders of Parquet files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmefficient.errors import InputError
from mmefficient.evaluation import Output, tasks
from mmefficient.evaluation.hub import is_hub

pytest.importorskip("pyarrow")
LETTER = "Answer with the option's letter from the given choices directly."


def picture(colour: tuple[int, int, int]) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


RED, BLUE = picture((200, 0, 0)), picture((0, 0, 200))


def save(folder: Path, split: str, rows: list[dict[str, Any]], images: tuple[str, ...] = ("image",)) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Dataset.from_list(rows).features
    for name in images:
        one = datasets.Image()
        features[name] = datasets.List(one) if isinstance(rows[0][name], list) else one
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_pope(tmp_path: Path) -> None:
    def row(number: int, category: str, answer: str, image: dict[str, Any]) -> dict[str, Any]:
        question = f"Is there a dog in the image {number}?"
        source = f"COCO_val2014_{number:012d}"
        return {"id": "0", "question_id": str(number), "question": question, "answer": answer} | {
            "image_source": source,
            "image": image,
            "category": category,
        }

    rows = [row(1, "random", "yes", RED), row(2, "random", "no", BLUE), row(1, "adversarial", "no", BLUE)]
    task = tasks.get("pope", save(tmp_path / "POPE", "test", rows))
    records = task.records(None, None)
    assert [(record.id, record.kind, record.truth) for record in records] == [
        ("random/1", "random", ("yes",)),
        ("random/2", "random", ("no",)),
        ("adversarial/1", "adversarial", ("no",)),
    ]
    assert records[0].question.startswith("Is there a dog in the image 1?\nAnswer")
    assert records[0].picture == "COCO_val2014_000000000001.jpg"
    red, blue = task.pictures(records[:2], torch.device("cpu"))
    assert isinstance(red, Image.Image)
    assert isinstance(blue, Image.Image)
    assert (red.getpixel((0, 0)), blue.getpixel((0, 0))) == ((200, 0, 0), (0, 0, 200))
    assert task.facts()["split"] == "test"


def test_bad_rows_are_named_or_counted(tmp_path: Path) -> None:
    ok = {"question_id": "1", "question": "?", "answer": "yes", "image_source": "a", "image": RED, "category": "random"}
    rows = [ok, {**ok, "question_id": "2", "answer": "maybe"}, {**ok, "question_id": "3", "image": None}, ok]
    folder = save(tmp_path / "POPE", "test", rows)
    with pytest.raises(InputError, match=r'POPE, test, record 2: the field "label" must be one of yes, no'):
        tasks.get("pope", folder)
    task = tasks.get("pope", folder, skip_bad=True)
    assert [record.id for record in task.records(None, None)] == ["random/1"]
    skipped = task.facts()["skipped_records"]
    assert [text.partition(": ")[0].rpartition(", ")[2] for text in skipped] == ["record 2", "record 4", "record 3"]


def test_vqav2_and_its_relatives(tmp_path: Path) -> None:
    answers = [{"answer": "two", "answer_confidence": "yes", "answer_id": i} for i in range(9)]
    answers.append({"answer": "2", "answer_confidence": "no", "answer_id": 9})
    rows = [{"question_id": 5, "image_id": 42, "question": "How many?", "answer_type": "number"}]
    vqa = save(tmp_path / "VQAv2", "validation", [{**rows[0], "answers": answers, "image": RED}])
    task = tasks.get("vqav2", vqa)
    records = task.records(None, None)
    assert records[0].truth == ("two",) * 9 + ("2",)
    assert task.kinds["question"].score(records, [Output("2")])["accuracy"].numerator[0] == pytest.approx(1)

    text = {"question_id": 5, "image_id": "abc", "question": "Which brand?", "answers": ["x"] * 10, "image": RED}
    assert tasks.get("textvqa", save(tmp_path / "t", "validation", [text])).records(None, None)[0].id == "5"

    viz = {"question_id": "VizWiz_val_0.jpg", "question": "?", "answers": ["x"] * 10, "image": RED, "category": "other"}
    record = tasks.get("vizwiz", save(tmp_path / "v", "val", [viz])).records(None, None)[0]
    assert (record.picture, record.category) == ("VizWiz_val_0.jpg", "other")


def test_documents(tmp_path: Path) -> None:
    row = {"questionId": "7", "question": "Which?", "docId": 3, "answers": ["a", "b"], "image": RED}
    folder = save(tmp_path / "DocVQA", "validation", [row])
    for name, picture in (("docvqa", "3"), ("infovqa", "1")):
        (record,) = tasks.get(name, folder).records(None, None)
        assert (record.id, record.picture, record.truth) == ("7", picture, ("a", "b"))


def test_multiple_choice_sets(tmp_path: Path) -> None:
    science = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "subject": "s", "image": RED}
    record = tasks.get("scienceqa", save(tmp_path / "s", "test", [science])).records(None, None)[0]
    assert (record.id, record.truth) == ("1", ("B", "a", "b"))

    bench = {"index": 7, "question": "Which?", "hint": "nan", "A": "a", "B": "b", "C": "nan", "D": "nan"}
    bench |= {"answer": "A", "category": "c", "image": RED}
    record = tasks.get("mmbench", save(tmp_path / "m", "dev", [bench])).records(None, None)[0]
    assert (record.question, record.truth) == (f"Which?\nA. a\nB. b\n{LETTER}", ("A", "a", "b"))

    seed: dict[str, Any] = {f"choice_{letter}": letter for letter in "abcd"}
    seed |= {"question_id": "9", "question": "?", "answer": "D", "data_id": "x", "data_type": "image"}
    seed |= {"question_type_id": 5, "image": [RED]}
    task = tasks.get("seedbench", save(tmp_path / "d", "test", [seed]))
    assert task.pictures(task.records(None, None), torch.device("cpu"))[0].size == (8, 8)

    mme = {
        "question": "Is it? Please answer yes or no.",
        "category": "count",
        "question_id": "count/1.jpg",
        "image": RED,
    }
    rows = [{**mme, "answer": "Yes"}, {**mme, "answer": "No"}]
    task = tasks.get("mme", save(tmp_path / "e", "test", rows))
    records = task.records(None, None)
    assert [(record.picture, record.truth) for record in records] == [
        ("count/1.jpg", ("yes",)),
        ("count/1.jpg", ("no",)),
    ]
    assert task.kinds["count"].score(records, [Output("yes"), Output("no")])["score"].numerator.sum() == 2


def test_mmmu_reads_the_published_files(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def row(number: int, **fields: Any) -> dict[str, Any]:
        pictures = {f"image_{i}": None for i in range(1, 8)} | {"image_1": RED}
        plain = {"id": f"validation_Art_Theory_{number}", "question": "<image 1> Who?", "options": "['Ann', \"Bob's\"]"}
        return {**plain, "answer": "B", "question_type": "multiple-choice", **pictures, **fields}

    rows = [row(1), row(2, question_type="open", options="[]"), row(3, image_2=BLUE)]
    (tmp_path / "Art_Theory").mkdir()
    path = tmp_path / "Art_Theory" / "validation-00000-of-00001.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    task = tasks.get("mmmu", tmp_path)
    (record,) = task.records(None, None)
    assert record.question == f"<image 1> Who?\nA. Ann\nB. Bob's\n\n{LETTER}"
    assert (record.truth, record.category) == (("B", "Ann", "Bob's"), "Art_Theory")
    assert task.pictures([record], torch.device("cpu"))[0].getpixel((0, 0)) == (200, 0, 0)  # type: ignore[union-attr]
    assert task.facts()["left_out"] == {"open question": 1, "question about several pictures": 1}

    parquet.write_table(pa.Table.from_pylist([row(1), row(2, options="[1")]), path)
    with pytest.raises(InputError, match=r'validation-.*parquet, record 2: the field "options" must be a Python list'):
        tasks.get("mmmu", tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"validation-.*parquet is not a Parquet file"):
        tasks.get("mmmu", tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"lacks \*/validation-\*.parquet"):
        tasks.get("mmmu", tmp_path)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("lmms-lab/POPE", True),
        ("lmms-lab/MMBench:en", True),
        ("./data/pope", False),
        ("/data/pope", False),
        ("pope", False),
    ],
)
def test_what_looks_like_a_hub_id(place: str, expected: bool) -> None:
    assert is_hub(place) is expected


def test_sets_without_a_hub_form_say_so() -> None:
    with pytest.raises(InputError, match="reads official files only"):
        tasks.get("chair", "owner/chair")


def test_what_datasets_cannot_load_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"datasets cannot load .*, split test"):
        tasks.get("pope", tmp_path)


def test_a_mistyped_folder_is_named_before_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    asked: list[object] = []

    def offline(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"There is no folder data/pope, and datasets cannot load .*offline"):
        tasks.get("pope", "data/pope")
    with pytest.raises(InputError, match="datasets cannot load owner/name:part"):
        tasks.get("pope", "owner/name:part")
    assert asked == [("data/pope", None), ("owner/name", "part")]
