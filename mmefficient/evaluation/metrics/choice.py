"""Multiple choice: reading the chosen letter out of an answer, plain and circular accuracy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from mmefficient.evaluation.task import Output, Ratio, Record, Scorer, ratio

LETTERS = "ABCDEFGHIJ"
Parser = Callable[[str, Sequence[str]], str | None]

_STARTS = re.compile(r"^\(?([A-J])(?:[.):,]|$)")
_BRACKETS = re.compile(r"\(([A-J])\)")
_ANSWER_IS = re.compile(r"\b[Aa]nswer(?: is|:)\s*:?\s*\(?([A-J])\b")


def lines(options: Sequence[str]) -> str:
    """Options as lines "A. …"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def letter(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses, or None.

    In order: the answer starts with a letter ("B", "B.", "(B) …", "B: …"); it says "answer is B" or "Answer: B"; it
    holds exactly one letter in brackets; it holds exactly one option's text (case aside).
    """
    text = text.strip()
    allowed = LETTERS[: len(options)]
    for pattern in (_STARTS, _ANSWER_IS, _BRACKETS):
        found = {match for match in pattern.findall(text) if match in allowed}
        if len(found) == 1:
            return found.pop()
    lower = text.lower()
    said = [i for i, option in enumerate(options) if option.strip() and option.strip().lower() in lower]
    return LETTERS[said[0]] if len(said) == 1 else None


def letter_scienceqa(text: str, options: Sequence[str]) -> str | None:
    """The letter as LLaVA's evaluation of ScienceQA reads it: the whole answer, "X. …", or one "The answer is X"."""
    text = text.strip()
    allowed = LETTERS[: len(options)]
    if len(text) == 1:
        return text if text in allowed else None
    if text[:1] in "ABCDE" and text[1:3] == ". ":
        return text[0] if text[0] in allowed else None
    said = re.findall(r"The answer is ([A-E])", text)
    return said[0] if len(said) == 1 and said[0] in allowed else None


def choice(parser: Parser = letter) -> Scorer:
    """A scorer of choices: `record.truth` is the right letter, then the options' texts.

    An answer that chooses nothing is wrong, and counted in "unparsed"; the official scripts of MMMU and MMBench guess
    or ask a language model instead.
    """

    def score(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
        said = [parser(output.text, record.truth[1:]) for record, output in zip(records, outputs, strict=True)]
        return {
            "accuracy": ratio([found == record.truth[0] for found, record in zip(said, records, strict=True)]),
            "unparsed": ratio([found is None for found in said]),
        }

    return score


def circular(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
    """As `choice`, with "circular": the share of items answered rightly under every rotation of their options (Liu et
    al. 2023, arXiv 2307.06281).

    Records of one item share its picture. Items of which some rotation was not asked (a limit) do not count.
    """
    plain = choice()(records, outputs)
    right = plain["accuracy"].numerator
    items: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        items[record.picture].append(i)
    hit, counted = [0.0] * len(records), [0.0] * len(records)
    for members in items.values():
        if len(members) == len(records[members[0]].truth) - 1:
            hit[members[0]], counted[members[0]] = float(all(right[i] for i in members)), 1.0
    return {"circular": ratio(hit, counted), **plain}
