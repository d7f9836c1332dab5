"""MMMU (Yue et al. 2023, arXiv 2311.16502), the multiple-choice questions of the validation split with one picture.

Files: the published Parquet files, `{subject}/validation-*.parquet`, with the columns id, question, options (a Python
list as text), answer, question_type and image_1 … image_7.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mmefficient.errors import InputError
from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import load_parquet
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.metrics.choice import LETTERS, choice, lines
from mmefficient.evaluation.rows import BadRecordError, LeftOutError, Picture, Row
from mmefficient.evaluation.task import Record
from mmefficient.images import load_image

_PICTURES = [f"image_{number}" for number in range(1, 8)]


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    paths = sorted(files.folder.glob("*/validation-*.parquet"))
    if not paths:
        raise InputError(f"{files.folder} lacks */validation-*.parquet, which the task mmmu needs.")
    for path in paths:
        yield from load_parquet(files, path)


def _record(row: Row, variant: Variant) -> Record:
    if row.one_of("question_type", ("multiple-choice", "open")) == "open":
        raise LeftOutError("open question")
    pictures = [encoded for name in _PICTURES if (encoded := row.field(name))]
    if len(pictures) > 1:
        raise LeftOutError("question about several pictures")
    content = pictures[0].get("bytes") if pictures and isinstance(pictures[0], dict) else None
    if not isinstance(content, bytes):
        raise BadRecordError("it has no picture")
    options = _options(row.text("options"))
    key = row.id("id")
    question = variant.prompt.format(question=row.text("question"), choices=lines(options))
    answer = row.one_of("answer", [letter.lower() for letter in LETTERS[: len(options)]]).upper()
    picture = Picture(key, row.where, lambda: load_image(content))
    subject = key.partition("_")[2].rpartition("_")[0]
    return Record(key, "question", question, picture.id, (answer, *options), picture, subject)


def _options(text: str) -> list[str]:
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, list) or len(options) < 2:
        raise BadRecordError('the field "options" must be a Python list of at least two texts')
    return [str(option) for option in options]


TASK = Dataset(
    name="mmmu",
    variants={
        "lmms": Variant("{question}\n{choices}\n\nAnswer with the option's letter from the given choices directly.")
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(choice(), "accuracy")},
)
