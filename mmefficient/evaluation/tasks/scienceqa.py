"""ScienceQA (Lu et al. 2022, arXiv 2209.09513), the test questions with a picture (2,017).

Files: `problems.json`, {id: {"question", "choices", "answer", "hint", "image", …}}, `pid_splits.json`, {split: [ids]},
and `images/test/{id}/image.png`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmefficient.errors import InputError
from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.metrics.choice import LETTERS, choice, letter_scienceqa, lines
from mmefficient.evaluation.rows import BadRecordError, LeftOutError, Row
from mmefficient.evaluation.task import Record


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    problems = files.keyed(files.find("problems.json"))
    path = files.find("pid_splits.json")
    splits = files.json(path)
    ids = splits.get("test") if isinstance(splits, dict) else None
    if not isinstance(ids, list):
        raise InputError(f'{path} must hold a list of ids under "test"; is it the official file?')
    for key in map(str, ids):
        row = problems.get(key)
        yield (
            files.row(path, f'"{key}"', BadRecordError("problems.json has no such problem"))
            if row is None
            else (row.also(pid=key))
        )


def _record(row: Row, variant: Variant) -> Record:
    options, right = row.texts("choices"), row.whole("answer")
    if not 0 <= right < len(options):
        raise BadRecordError(f"its answer is choice {right} of {len(options)}")
    if row.field("image") is None and row.has("image"):
        raise LeftOutError("question without a picture")
    picture = row.picture(f"{row.id('pid')}/image.png", "images/test", "test", "images", ".")
    hint = row.text("hint", empty=True)
    text = variant.prompt.format(
        question=row.text("question"),
        context=f"Context: {hint}\n" if hint else "",
        hint=hint or "N/A",
        choices=lines(options),
        brackets=" ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)),
    )
    truth = (LETTERS[right], *options)
    return Record(row.id("pid"), "question", text, picture.id, truth, picture, row.option("subject"))


TASK = Dataset(
    name="scienceqa",
    variants={
        "lmms": Variant(
            "{context}{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
        ),
        "cqm": Variant("Context: {hint}\nQuestion: {question}\nOptions: {brackets}", 64),
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(choice(letter_scienceqa), "accuracy")},
    hub=Hub("test", {"pid": "record"}),
)
