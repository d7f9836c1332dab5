"""VQA accuracy and its answer normalisation (Antol et al. 2015, arXiv 1505.00468; rules of the official evaluation).

The rules are re-stated from the definitions; `data/vqa_contractions.json` is the official table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

from mmefficient.evaluation.task import Output, Ratio, Record, Scorer, ratio

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_LOOSE_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32  # the official script passes a flag of this value where the number of replacements belongs
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")


@lru_cache(maxsize=1 << 16)  # annotators repeat themselves
def normalise_answer(text: str) -> str:
    """The official normal form: punctuation and loose stops go, number words become digits, articles go.

    A punctuation mark is deleted where some such mark touches a space or the text holds a number with a comma; else it
    becomes a space.
    """
    text = _one_line(text)
    result = text
    for mark in _PUNCTUATION:
        delete = f"{mark} " in text or f" {mark}" in text or _NUMBER_COMMA.search(text) is not None
        result = result.replace(mark, "" if delete else " ")
    result = _LOOSE_STOP.sub("", result, count=_MOST_STOPS)
    words = [_WORDS.get(word, word) for word in result.lower().split()]
    return " ".join(contractions().get(word, word) for word in words if word not in _ARTICLES)


def normalise_answer_evalai(text: str) -> str:
    """As `normalise_answer`, after the steps of the processor behind TextVQA's numbers: commas and question marks go,
    "'s" is split off."""
    return normalise_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def accuracy_of(answer: str, given: Sequence[str]) -> float:
    """Agreement with annotators: the mean over leaving each out of min(1, matches among the others / 3).

    For ten annotators 0, 1, 2, 3, ≥ 4 matches give 0, 0.3, 0.6, 0.9, 1.
    """
    matches = [other == answer for other in given]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(given)


def vqa_accuracy(*, evalai: bool = False) -> Scorer:
    """A scorer against `record.truth`, the annotators' answers.

    The official script normalises both sides only where the annotators' raw answers differ; with `evalai`, as in the
    processor used for TextVQA, it always does.
    """

    def one(record: Record, output: Output) -> float:
        if evalai:
            return accuracy_of(normalise_answer_evalai(output.text), [normalise_answer_evalai(a) for a in record.truth])
        if len(set(record.truth)) == 1:
            return accuracy_of(_one_line(output.text), [_one_line(answer) for answer in record.truth])
        return accuracy_of(normalise_answer(output.text), [normalise_answer(answer) for answer in record.truth])

    def score(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
        return {"accuracy": ratio([one(record, output) for record, output in zip(records, outputs, strict=True)])}

    return score


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@cache
def contractions() -> dict[str, str]:
    """The official table: a contraction without its apostrophe -> the contraction."""
    table: dict[str, str] = json.loads(CONTRACTIONS.read_text(encoding="utf-8"))
    return table


CONTRACTIONS = Path(__file__).parent / "data" / "vqa_contractions.json"
