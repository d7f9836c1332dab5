from __future__ import annotations

import math

import numpy as np
import pytest

from mmefficient.evaluation.metrics.pope import pope, says_yes
from mmefficient.evaluation.task import Output, Record

# (label, answer): TP 3 (one of them vague), FN 2, FP 1, TN 2
CASES = [
    ("yes", "Yes, there is."),
    ("yes", "yes"),
    ("yes", "It looks like it"),
    ("yes", "No."),
    ("yes", "There is not"),
    ("no", "Yes. There is no doubt."),
    ("no", "no"),
    ("no", "No, there is not"),
]


def values(cases: list[tuple[str, str]]) -> dict[str, float]:
    records = [Record(str(i), "existence", "?", str(i), (label,)) for i, (label, _) in enumerate(cases)]
    ratios = pope(records, [Output(text) for _, text in cases])
    return {name: ratio.numerator.sum() / ratio.denominator.sum() for name, ratio in ratios.items()}


def test_scores_equal_those_computed_by_hand() -> None:
    assert values(CASES) == pytest.approx(
        {
            "accuracy": 5 / 8,
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5),
            "mcc": (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2)),
            "yes_rate": 4 / 8,
            "false_positive_rate": 1 / 3,
            "vague": 1 / 8,
            "true_positives": 3,
            "false_positives": 1,
            "true_negatives": 2,
            "false_negatives": 2,
        }
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", False),
        ("No, it is absent", False),
        ("it is not there", False),
        ("yes", True),
        ("", True),
        ("NO", True),  # the official parser knows three spellings
        ("no\n", True),  # and splits at single spaces only
        ("Nope", True),
        ("There isn't", True),
        ("Yes. No.", True),  # and reads the first sentence only
        ("I know nothing", True),
        ("yes,no", True),  # commas go before the split, "yesno" is no "no"
    ],
)
def test_parser_follows_the_official_script(text: str, expected: bool) -> None:
    assert says_yes(text) is expected


def test_mcc_is_undefined_where_every_answer_agrees() -> None:
    records = [Record(str(i), "existence", "?", "p", (label,)) for i, label in enumerate(("yes", "no"))]
    mcc = pope(records, [Output("yes")] * 2)["mcc"]
    assert mcc.numerator.sum() == mcc.denominator.sum() == 0


def test_the_bootstrap_of_mcc_is_that_of_the_correlation() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(600) < 0.4
    said = np.where(rng.random(600) < 0.8, truth, rng.random(600) < 0.6)
    records = [Record(str(i), "existence", "?", str(i), ("yes" if t else "no",)) for i, t in enumerate(truth)]
    mcc = pope(records, [Output("yes" if s else "no") for s in said])["mcc"]
    drawn = rng.integers(0, 600, size=(500, 600))
    ratios = mcc.numerator[drawn].sum(1) / mcc.denominator[drawn].sum(1)
    exact = [np.corrcoef(truth[rows], said[rows])[0, 1] for rows in drawn]
    assert ratios.std() == pytest.approx(np.std(exact), rel=0.02)
    assert np.abs(ratios - exact).max() < 0.01
