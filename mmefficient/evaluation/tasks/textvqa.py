"""TextVQA (Singh et al. 2019, arXiv 1904.08920), validation split of version 0.5.1.

Files: `TextVQA_0.5.1_val.json`, {"data": [{"question_id", "image_id", "question", "answers": [10 texts]}]}, and
`train_images/{image_id}.jpg`. The variant `llava-ocr`, behind LLaVA's published number, also needs LLaVA's question
file `llava_textvqa_val_v051_ocr.jsonl`, whose prompts list the words an OCR system found.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.vqa import vqa_accuracy
from mmefficient.evaluation.rows import Row
from mmefficient.evaluation.task import Record


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    rows = files.array(files.find("TextVQA_0.5.1_val.json"), "data")
    if variant.mode != "ocr":
        yield from rows
        return
    prompts = dict(key for _, key in files.each(files.json_lines(files.find("llava_textvqa_val_v051_ocr.jsonl")), _ocr))
    for row, key in files.each(rows, lambda row: (row.id("image_id"), row.text("question").lower())):
        text = prompts.get(key)
        yield (
            row.spoiled("no prompt with OCR words is for its picture and question")
            if text is None
            else row.also(prompt=text)
        )


def _ocr(row: Row) -> tuple[tuple[str, str], str]:
    text = row.text("text")
    return (row.id("question_id"), text.split("\n")[0].strip().lower()), text


def _record(row: Row, variant: Variant) -> Record:
    picture = row.picture(f"{row.id('image_id')}.jpg", "train_images", "train_val_images/train_images", "images", ".")
    question = variant.prompt.format(question=row.text("question"), prompt=row.option("prompt"))
    return Record(row.id("question_id"), "question", question, picture.id, row.answers("answers", 10), picture)


TASK = Dataset(
    name="textvqa",
    variants={
        "llava": Variant("{question}\nAnswer the question using a single word or phrase."),
        "llava-ocr": Variant("{prompt}", mode="ocr"),
        "plain": Variant("{question}"),
    },
    rows=_rows,
    record=_record,
    scorers={"question": vqa_accuracy(evalai=True)},
    hub=Hub("validation"),
)
