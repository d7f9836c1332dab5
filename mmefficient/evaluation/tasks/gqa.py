"""GQA (Hudson and Manning 2019, arXiv 1902.09506), balanced test-dev split.

Files: `testdev_balanced_questions.json`, {question id: {"imageId", "question", "answer", "types", …}}, and
`images/{imageId}.jpg`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.rows import Row
from mmefficient.evaluation.task import Output, Ratio, Record, ratio


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    path = files.find("testdev_balanced_questions.json", "questions*/testdev_balanced_questions.json")
    for key, row in files.keyed(path).items():
        yield row.also(id=key)


def _record(row: Row, variant: Variant) -> Record:
    picture = row.picture(f"{row.id('imageId')}.jpg", "images", "allImages/images", ".")
    question = variant.prompt.format(question=row.text("question"))
    types = row.field("types")
    category = str(types.get("structural", "")) if isinstance(types, dict) else ""
    return Record(row.id("id"), "question", question, picture.id, (row.text("answer"),), picture, category)


def exact(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
    """Equality with the answer, of the prediction in lower case without final stops."""
    said = [output.text.strip().rstrip(".").lower() for output in outputs]
    return {"accuracy": ratio([text == record.truth[0] for text, record in zip(said, records, strict=True)])}


TASK = Dataset(
    name="gqa",
    variants={
        "llava": Variant("{question}\nAnswer the question using a single word or phrase."),
        "plain": Variant("{question}"),
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(exact, "accuracy")},
)
