"""easy-VQA: the public set that the PyPI package `easy-vqa` carries (4,000 + 1,000 pictures of one shape), test split.

Files: `test/questions.json`, a list of [question, answer, image id], and `test/images/{id}.png`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mmefficient.errors import InputError
from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.metrics.accuracy import accuracy
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.rows import BadRecordError, Row
from mmefficient.evaluation.task import Record

_SHAPES = ("circle", "rectangle", "triangle")


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    path = files.find("test/questions.json")
    names = ("question", "answer", "image")
    for number, row in enumerate(files.array(path), 1):
        value: object = BadRecordError("it is not a list of question, answer and image id")
        if isinstance(row.value, list) and len(row.value) == len(names):
            value = {**dict(zip(names, row.value, strict=True)), "number": number}
        yield files.row(path, f"record {number}", value)


def _record(row: Row, variant: Variant) -> Record:
    picture = row.picture(f"{row.id('image')}.png", "test/images")
    answer = row.text("answer")
    category = "yes-no" if answer in ("yes", "no") else "shape" if answer in _SHAPES else "colour"
    question = variant.prompt.format(question=row.text("question"))
    return Record(row.id("number"), "question", question, picture.id, (answer,), picture, category)


def _package() -> Path:
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise InputError("The task easy-vqa needs the package that carries it: pip install 'mmefficient[eval]'.")
    return Path(spec.origin).parent / "data"


TASK = Dataset(
    name="easy-vqa",
    variants={
        "plain": Variant("{question}"),
        "llava": Variant("{question}\nAnswer the question using a single word or phrase."),
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(accuracy, "accuracy")},
    default=_package,
)
