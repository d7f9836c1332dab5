"""SEED-Bench (Li et al. 2023, arXiv 2307.16125), the questions about images.

Files: `SEED-Bench.json`, {"questions": [{"question_id", "question", "choice_a" … "choice_d", "answer", "data_id",
"data_type", "question_type_id"}], "question_type": {name: id}}, and `SEED-Bench-image/{data_id}`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.metrics.choice import choice, lines
from mmefficient.evaluation.rows import LeftOutError, Row
from mmefficient.evaluation.task import Record

_IMAGE = "image"


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    path = files.find("SEED-Bench.json")
    content = files.json(path)
    types = content.get("question_type") if isinstance(content, dict) else None
    names = {number: name for name, number in types.items()} if isinstance(types, dict) else {}
    for row in files.array(path, "questions"):
        yield row.also(category=names.get(row.field("question_type_id"), ""))


def _record(row: Row, variant: Variant) -> Record:
    if row.one_of("data_type", ("image", "video")) != _IMAGE:
        raise LeftOutError("question about a video")
    options = [row.text(f"choice_{letter}") for letter in "abcd"]
    picture = row.picture(row.text("data_id"), "SEED-Bench-image", ".")
    question = variant.prompt.format(question=row.text("question"), choices=lines(options))
    truth = (row.one_of("answer", ("a", "b", "c", "d")).upper(), *options)
    category = row.option("category") or row.option("question_type_id")
    return Record(row.id("question_id"), "question", question, picture.id, truth, picture, category)


TASK = Dataset(
    name="seedbench",
    variants={
        "llava": Variant("{question}\n{choices}\nAnswer with the option's letter from the given choices directly.")
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(choice(), "accuracy")},
    hub=Hub("test"),
)
