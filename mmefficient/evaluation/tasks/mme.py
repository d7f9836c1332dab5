"""MME (Fu et al. 2023, arXiv 2306.13394): two yes/no questions about every picture, in 14 subtasks.

Files, in the data folder or its `MME_Benchmark_release_version/`: a folder per subtask with the pictures (or
`images/`), and the questions either as `{subtask}.txt` (lines picture, question, Yes|No; also looked for in
`eval_tool/Your_Results/`) or as one text file per picture beside it (or in `questions_answers_YN/`; lines question,
Yes|No).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from mmefficient.errors import InputError
from mmefficient.evaluation.data import Dataset, Variant
from mmefficient.evaluation.files import Files
from mmefficient.evaluation.hub import Hub
from mmefficient.evaluation.metrics.mme import mme
from mmefficient.evaluation.rows import Row
from mmefficient.evaluation.task import Record

_HALLUCINATION = ("existence", "count", "position", "color")
_PERCEPTION = (*_HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ROOTS = ("", "MME_Benchmark_release_version/", "MME_Benchmark_release_version/MME_Benchmark/")
_SUFFIXES = (".jpg", ".png", ".jpeg")


def _rows(files: Files, variant: Variant) -> Iterator[Row]:
    for subtask in (*_PERCEPTION, *_COGNITION):
        pictures: dict[str, list[Row]] = defaultdict(list)
        for row, name in files.each(_lines(files, subtask), lambda row: row.text("image")):
            pictures[name].append(row)
        for rows in pictures.values():
            for number, row in enumerate(rows, 1):
                fine = row.also(category=subtask, number=number)
                yield fine if len(rows) == 2 else row.spoiled(f"its picture has {len(rows)} question(s), not two")


def _lines(files: Files, subtask: str) -> list[Row]:
    places = [f"{root}{folder}{subtask}.txt" for root in _ROOTS for folder in ("", "eval_tool/Your_Results/")]
    path = files.maybe(*places, f"Your_Results/{subtask}.txt")
    if path is not None:
        return files.lines(path, "image", "question", "answer")
    rows = []
    for root in _ROOTS:
        for folder in (f"{root}{subtask}/questions_answers_YN", f"{root}{subtask}"):
            for path in sorted((files.folder / folder).glob("*.txt")):
                names = [path.stem + suffix for suffix in _SUFFIXES]
                near = (path.parent, path.parent.parent / "images")
                name = next((name for name in names for place in near if (place / name).is_file()), names[0])
                rows += [row.also(image=name) for row in files.lines(path, "question", "answer")]
    if not rows:
        raise InputError(f"{files.folder} lacks {subtask}.txt and the folder {subtask}, which the task mme needs.")
    return rows


def _record(row: Row, variant: Variant) -> Record:
    subtask, name = row.text("category"), row.text("image")
    picture = row.picture(name, *(f"{root}{subtask}{folder}" for root in _ROOTS for folder in ("", "/images")))
    question = row.text("question")
    text = variant.prompt.format(question=question, bare=question.removesuffix("Please answer yes or no.").strip())
    answer = row.one_of("answer", ("yes", "no"))
    key = f"{subtask}/{name.removeprefix(f'{subtask}/')}"
    return Record(f"{key}/{row.id('number')}", subtask, text, key, (answer,), picture)


TASK = Dataset(
    name="mme",
    variants={
        "llava": Variant("{bare}\nAnswer the question using a single word or phrase."),
        "official": Variant("{question}"),
    },
    rows=_rows,
    record=_record,
    scorers=dict.fromkeys((*_PERCEPTION, *_COGNITION), mme),
    groups={"perception": _PERCEPTION, "cognition": _COGNITION, "hallucination": _HALLUCINATION},
    hub=Hub("test", {"image": "question_id", "number": "record"}),
)
