from __future__ import annotations

import pytest

from mmefficient.evaluation.metrics.mme import mme, parse
from mmefficient.evaluation.task import Output, Record


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        (" no.\n", "no"),
        ("Y", "yes"),
        ("n.", "no"),
        ("Yes, there is.", "yes"),
        ("Not at all", "no"),
        ("No yes", "no"),  # only the first four characters count
        ("y no", "no"),
        ("There is no dog", "other"),
        ("x", "other"),
        ("", "other"),
    ],
)
def test_parser(text: str, said: str) -> None:
    assert parse(text) == said


def test_score_is_accuracy_plus_pairs() -> None:
    """Pictures p: both right, q: one right, r: none; s: one question asked, right.

    accuracy 4/7; accuracy+ 1/3; score (2 + 0.5 + 0)/3, of which each picture's halves and pairs are the parts.
    """
    truth = ["yes", "no"] * 3 + ["yes"]
    records = [Record(str(i), "count", "?", "ppqqrrs"[i], (truth[i],)) for i in range(7)]
    said = ["Yes", "No", "Yes", "Yes", "No", "maybe", "Yes"]
    ratios = mme(records, [Output(text) for text in said])
    sums = {name: (ratio.numerator.sum(), ratio.denominator.sum()) for name, ratio in ratios.items()}
    assert sums == {
        "score": (2.5, 3),
        "accuracy": (4, 7),
        "accuracy_plus": (1, 3),
        "yes_rate": (4, 7),
        "other": (1, 7),
    }
