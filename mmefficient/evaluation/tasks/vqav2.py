"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837), validation split.

Files: `v2_OpenEnded_mscoco_val2014_questions.json`, `v2_mscoco_val2014_annotations.json` and the pictures of COCO
val2014. The test splits have no public answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.metrics.vqa import vqa_accuracy
from mmefficient.evaluation.rows import Row
from mmefficient.evaluation.task import Record


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    questions = files.array(files.find("v2_OpenEnded_mscoco_val2014_questions.json"), "questions")
    annotations = files.array(files.find("v2_mscoco_val2014_annotations.json"), "annotations")
    answers = files.index(annotations, "question_id")
    for row, key in files.each(questions, lambda row: row.id("question_id")):
        answered = answers.get(key)
        if answered is None:
            yield row.spoiled(f"no annotation has its question_id {key}")
        else:
            yield row.also(answers=answered.field("answers"), answer_type=answered.option("answer_type"))


def _record(row: Row, variant: Variant) -> Record:
    picture = row.picture(f"COCO_val2014_{row.whole('image_id'):012d}.jpg", "val2014", "images", "images/val2014", ".")
    question = variant.prompt.format(question=row.text("question"))
    answers = row.answers("answers", 10)
    return Record(row.id("question_id"), "question", question, picture.id, answers, picture, row.option("answer_type"))


TASK = Dataset(
    name="vqav2",
    variants={
        "llava": Variant("{question}\nAnswer the question using a single word or phrase."),
        "plain": Variant("{question}"),
    },
    rows=_rows,
    record=_record,
    scorers={"question": by_category(vqa_accuracy(), "accuracy")},
    hub=Hub("validation"),
)
