"""ANLS: average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648)."""

from __future__ import annotations

from collections.abc import Sequence

from mmefficient.evaluation.task import Output, Ratio, Record, ratio

THRESHOLD = 0.5


def similarity(answer: str, accepted: Sequence[str]) -> float:
    """max over accepted answers of 1 − NL where NL < 0.5, else 0.

    NL is the Levenshtein distance over the longer length, of texts in lower case with single spaces.
    """
    text = _normal(answer)
    distances = [_relative_distance(text, _normal(other)) for other in accepted]
    return max((1 - distance for distance in distances if distance < THRESHOLD), default=0.0)


def anls(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
    """The mean similarity to `record.truth`, and the share of answers equal to one of them in the same normal form."""
    values = [similarity(output.text, record.truth) for record, output in zip(records, outputs, strict=True)]
    return {"anls": ratio(values), "exact": ratio([value == 1 for value in values])}


def levenshtein(a: str, b: str) -> int:
    """Least number of insertions, deletions and substitutions of characters that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _relative_distance(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    return levenshtein(a, b) / longer if longer else 0.0


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
