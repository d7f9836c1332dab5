"""POPE (Li et al. 2023, arXiv 2305.10355): is there a given object in the picture? Three ways to choose absent objects.

Files: `coco_pope_{random,popular,adversarial}.json` (or the A-OKVQA and GQA versions), JSON lines or one list of
{"question_id", "image", "text", "label"}, and the pictures. Files of the same name differ between releases: the
report's hashes tell which was used.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.pope import pope
from mmefficient.evaluation.rows import Row
from mmefficient.evaluation.task import Record

_KINDS = ("random", "popular", "adversarial")
_FOLDERS = ("val2014", "images", "coco/val2014", "coco/images/val2014", "images/val2014", ".")


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    for kind in _KINDS:
        path = files.find(f"*_pope_{kind}.json", f"coco/*_pope_{kind}.json", f"output/coco/*_pope_{kind}.json")
        yield from (row.also(kind=kind) for row in files.json_lines(path))


def _record(row: Row, variant: Variant) -> Record:
    kind = row.one_of("kind", _KINDS)
    name = row.text("image")
    picture = row.picture(name if "." in name else f"{name}.jpg", *_FOLDERS)
    question = variant.prompt.format(question=row.text("text"))
    label = row.one_of("label", ("yes", "no"))
    return Record(f"{kind}/{row.id('question_id')}", kind, question, picture.id, (label,), picture)


TASK = Dataset(
    name="pope",
    variants={
        "llava": Variant("{question}\nAnswer the question using a single word or phrase."),
        "plain": Variant("{question}"),
        "vcd": Variant("{question} Please answer this question with one word."),
        "vaf": Variant("{question} Please just answer yes or no."),
    },
    rows=_rows,
    record=_record,
    scorers=dict.fromkeys(_KINDS, pope),
    groups={"mean": _KINDS},
    hub=Hub("test", {"kind": "category", "image": "image_source", "text": "question", "label": "answer"}),
)
