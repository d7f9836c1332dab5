"""AMBER (Wang et al. 2023, arXiv 2311.07397), the 14,216 yes/no questions.

Files (in `data/` or beside it): `query/query_discriminative.json`, a list of {"id", "image", "query"},
`annotations.json`, a list of {"id", "type", "truth"}, and the pictures in `image/`. The generative part needs a tagger,
WordNet and word vectors, and is not here.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.metrics.amber import amber
from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.rows import BadRecordError, Row
from mmefficient.evaluation.task import Record

_PARTS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    queries = files.array(
        files.find(
            "query/query_discriminative.json", "data/query/query_discriminative.json", "query_discriminative.json"
        )
    )
    truths = files.index(files.array(files.find("annotations.json", "data/annotations.json")), "id")
    for row, key in files.each(queries, lambda row: row.id("id")):
        truth = truths.get(key)
        if truth is None:
            yield row.spoiled(f"no annotation has its id {key}")
        else:
            yield row.also(type=truth.field("type"), truth=truth.field("truth"))


def _record(row: Row, variant: Variant) -> Record:
    part = _PARTS.get(row.text("type"))
    if part is None:
        raise BadRecordError(f'its type "{row.text("type")}" is none of the yes/no questions\'')
    picture = row.picture(row.text("image"), "image", "images", "AMBER", ".")
    question = variant.prompt.format(question=row.text("query"))
    truth = (row.one_of("truth", ("yes", "no")),)
    return Record(row.id("id"), "discriminative", question, picture.id, truth, picture, part)


TASK = Dataset(
    name="amber",
    variants={
        "llava": Variant("{question}\nAnswer the question using a single word or phrase."),
        "official": Variant("{question}"),
    },
    rows=_rows,
    record=_record,
    scorers={"discriminative": by_category(amber, "accuracy", "f1")},
)
