"""MME's scores of yes/no questions, two per picture (Fu et al. 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mmefficient.evaluation.task import Output, Ratio, Record, ratio


def parse(text: str) -> str:
    """What an answer says: "yes", "no" or "other".

    Without stops and case: the whole answer (or its single letter y, n), else what its first four characters hold, yes
    before no.
    """
    text = text.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme(records: Sequence[Record], outputs: Sequence[Output]) -> dict[str, Ratio]:
    """Accuracy over questions, accuracy+ (both questions of a picture right) over pictures, and score, their sum.

    As percentages the score is MME's, at most 200; accuracy+ and score count pictures of which both questions were
    asked. `record.truth[0]` is "yes" or "no".
    """
    said = [parse(output.text) for output in outputs]
    right = [answer == record.truth[0] for answer, record in zip(said, records, strict=True)]
    pictures: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        pictures[record.picture].append(i)
    both, score, counted = ([0.0] * len(records) for _ in range(3))
    for members in pictures.values():
        if len(members) == 2:
            hits = sum(right[i] for i in members)
            both[members[0]], counted[members[0]] = float(hits == 2), 1.0
            score[members[0]] = hits / 2 + (hits == 2)
    return {
        "score": ratio(score, counted),
        "accuracy": ratio(right),
        "accuracy_plus": ratio(both, counted),
        "yes_rate": ratio([answer == "yes" for answer in said]),
        "other": ratio([answer == "other" for answer in said]),
    }
