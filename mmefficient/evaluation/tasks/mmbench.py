"""MMBench (Liu et al. 2023, arXiv 2307.06281): multiple choice, plain or under every rotation of the options.

File: one official table (`mmbench_dev_20230712.tsv`, `MMBench_DEV_EN.tsv`, …) with the columns index, question, hint,
A, B, C, D, answer, category and image (base64, or the index of the row that holds the picture). Rows from index
1,000,000 on, where a table has them, are rotations; the circular variants make their own. Test splits have no public
answers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import replace

from PIL.Image import Image

from mmefficient.errors import InputError
from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.metrics.choice import LETTERS, circular, lines
from mmefficient.evaluation.rows import BadRecordError, LeftOutError, Picture, Row
from mmefficient.evaluation.task import Record
from mmefficient.images import load_image

_ROTATED = 1_000_000  # from this index on, rows repeat an earlier question with its options rotated
_LETTER = "Answer with the option's letter from the given choices directly."
_LETTER_CN = "请直接回答选项字母。"


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    rows = files.table(files.find("*.tsv"))
    images = {row.option("index"): row.option("image") for row in reversed(rows)}  # of equal indices the first counts
    for row in rows:
        image = row.option("image")
        row = row.also(image=images.get(image, image)) if row.has("image") else row
        turns = len(_options(row)) if variant.mode == "circular" and not _rotated(row) else 1
        yield from (row.also(turn=turn) for turn in range(max(1, turns)))


def _rotated(row: Row) -> bool:
    index = row.option("index")
    return index.isdecimal() and int(index) >= _ROTATED


def _options(row: Row) -> list[str]:
    """The options up to the first missing one."""
    found = [row.option(name) for name in "ABCD"]
    return found[: found.index("")] if "" in found else found


def _record(row: Row, variant: Variant) -> Record:
    index = row.id("index")
    if not index.isdecimal():
        raise BadRecordError(f'its index "{index}" is not a whole number')
    if _rotated(row):
        raise LeftOutError("rotation in the table (the circular variants make their own)")
    options, turn = _options(row), row.whole("turn") if row.has("turn") else 0
    if len(options) < 2:
        raise BadRecordError("it has fewer than two options")
    right = LETTERS.index(row.one_of("answer", [letter.lower() for letter in LETTERS[: len(options)]]).upper())
    turned = options[turn:] + options[:turn]
    hint = row.option("hint")
    question = variant.prompt.format(
        hint=f"{hint}\n" if hint else "", question=row.text("question"), choices=lines(turned)
    )
    picture = _picture(row, index)
    truth = (LETTERS[(right - turn) % len(options)], *turned)
    return Record(f"{index}/{turn}", "question", question, picture.id, truth, picture, row.option("category"))


def _picture(row: Row, index: str) -> Picture:
    if not row.has("image"):
        return row.picture(index)
    text = row.text("image")
    if text.isdecimal():
        raise BadRecordError(f"its picture is that of row {text}, which the table lacks")

    def read() -> Image:
        try:
            return load_image(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise InputError(f"its picture is not base64 ({error}); download the table again.") from error

    return Picture(index, row.where, read)


_PLAIN = Variant("{hint}{question}\n{choices}\n" + _LETTER)
_CHINESE = Variant("{hint}{question}\n{choices}\n" + _LETTER_CN)

TASK = Dataset(
    name="mmbench",
    variants={
        "llava": _PLAIN,
        "circular": replace(_PLAIN, mode="circular"),
        "cn": _CHINESE,
        "cn-circular": replace(_CHINESE, mode="circular"),
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(circular, "accuracy")},
    hub=Hub("dev"),
)
