"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218), validation split.

Files: `val.json` (or `Annotations/val.json`), a list of {"image", "question", "answers": [{"answer", …} × 10],
"answer_type"}, and the pictures in `val/`. The test split has no public answers.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.metrics.vqa import vqa_accuracy
from mmefficient.evaluation.rows import Row
from mmefficient.evaluation.task import Record


def _rows(files: Files, variant: Variant) -> Iterable[Row]:
    return files.array(files.find("val.json", "Annotations/val.json", "annotations/val.json"))


def _record(row: Row, variant: Variant) -> Record:
    picture = row.picture(row.text("image"), "val", "images/val", "images", ".")
    question = variant.prompt.format(question=row.text("question"))
    return Record(
        picture.id,
        "question",
        question,
        picture.id,
        row.answers("answers", 10),
        picture,
        row.option("answer_type"),
    )


TASK = Dataset(
    name="vizwiz",
    variants={
        "llava": Variant(
            "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
            "Answer the question using a single word or phrase."
        ),
        "plain": Variant("{question}"),
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(vqa_accuracy(), "accuracy")},
    hub=Hub("val", {"image": "question_id", "answer_type": "category"}),
)
