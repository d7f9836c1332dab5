"""DocVQA (Mathew et al. 2021, arXiv 2007.00398), validation split.

Files: `val_v1.0_withQT.json` or `val_v1.0.json`, {"data": [{"questionId", "question", "image", "answers"}]}, and the
pictures in `documents/` or `spdocvqa_images/`.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.anls import anls
from mmefficient.evaluation.rows import Row
from mmefficient.evaluation.task import Record

VARIANTS = {
    "llava": Variant("{question}\nAnswer the question using a single word or phrase.", 32),
    "plain": Variant("{question}", 32),
}


def dataset(name: str, files: tuple[str, ...], image: str, folders: tuple[str, ...]) -> Dataset:
    """A set in the format of the Document Visual Question Answering challenges."""

    def rows(at: Files, variant: Variant) -> Iterable[Row]:
        return at.array(at.find(*files), "data")

    def record(row: Row, variant: Variant) -> Record:
        picture = row.picture(row.id(image).rpartition("/")[2], *folders)
        question = variant.prompt.format(question=row.text("question"))
        return Record(row.id("questionId"), "question", question, picture.id, row.texts("answers"), picture)

    hub = Hub("validation", {image: "docId" if name == "docvqa" else "record"})
    return Dataset(name, VARIANTS, rows, record, {"question": anls}, hub=hub)


TASK = dataset(
    "docvqa",
    ("val_v1.0_withQT.json", "val_v1.0.json"),
    "image",
    ("documents", "spdocvqa_images", "images", "."),
)
