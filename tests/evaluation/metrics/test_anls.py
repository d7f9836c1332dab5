from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmefficient.evaluation.metrics.anls import anls, levenshtein, similarity
from mmefficient.evaluation.task import Output, Record


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_distance(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8), st.text("ab ", max_size=8))
def test_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("said", "accepted", "value"),
    [
        ("0.28", ("0.28",), 1),
        ("  University   of CALIFORNIA ", ("university of california",), 1),
        ("abcd", ("abcx",), 0.75),
        ("abcd", ("abxy",), 0),  # NL is exactly the threshold
        ("abcde", ("abcxy",), 0.6),
        ("abcd", ("zzzz", "abcx", "abxy"), 0.75),  # the best of the accepted
        ("", ("",), 1),
        ("", ("a",), 0),
    ],
)
def test_similarity(said: str, accepted: tuple[str, ...], value: float) -> None:
    assert similarity(said, accepted) == pytest.approx(value)


def test_scores() -> None:
    records = [Record(str(i), "question", "?", "p", ("abcd",)) for i in range(3)]
    ratios = anls(records, [Output("ABCD"), Output("abcx"), Output("no")])
    assert ratios["anls"].numerator.tolist() == pytest.approx([1, 0.75, 0])
    assert ratios["exact"].numerator.tolist() == [1, 0, 0]
