from __future__ import annotations

import pytest

from mmefficient.evaluation.metrics.vqa import (
    accuracy_of,
    contractions,
    normalise_answer,
    normalise_answer_evalai,
    vqa_accuracy,
)
from mmefficient.evaluation.task import Output, Record


@pytest.mark.parametrize(("matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_ten_annotators_give_the_published_values(matches: int, value: float) -> None:
    given = ["cat"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert accuracy_of("cat", given) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("u.s.a.", "usa"),
        ("3.", "3"),
        ("1.5", "1.5"),
        ("The cat", "cat"),
        ("an apple a day", "apple day"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("dont", "don't"),
        ("Dont know", "don't know"),
        ("red/white", "red white"),  # the mark touches no space: it becomes one
        ("red / white", "red white"),  # it touches one: it goes
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("10,000", "10000"),  # a number with a comma: every mark goes
        ("10,000/month", "10000month"),
        ("yes!", "yes"),
        ("t-shirt", "t shirt"),
        ("  new\nyork\t", "new york"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


def test_at_most_32_stops_go() -> None:
    assert normalise_answer("." * 40 + "a1") == "." * 8 + "a1"


@pytest.mark.parametrize(
    ("text", "normal"), [("red,white", "redwhite"), ("why?me", "whyme"), ("dog's bowl", "dog 's bowl"), ("The", "")]
)
def test_the_other_processor_drops_commas_first(text: str, normal: str) -> None:
    assert normalise_answer_evalai(text) == normal


def test_the_table_of_contractions_is_the_official_one() -> None:
    table = contractions()
    assert len(table) == 120
    assert (table["couldnt"], table["somebody'd"], table["yall"]) == ("couldn't", "somebodyd", "y'all")


def score(answers: list[str], said: str, *, evalai: bool = False) -> float:
    record = Record("1", "question", "?", "p", tuple(answers))
    return float(vqa_accuracy(evalai=evalai)([record], [Output(said)])["accuracy"].numerator[0])


def test_agreeing_annotators_switch_the_official_normalisation_off() -> None:
    assert score(["Two"] * 10, "2") == 0
    assert score(["Two"] * 10, "Two\n") == 1
    assert score(["Two"] * 9 + ["2"], "The two") == 1
    assert score(["Two"] * 10, "2", evalai=True) == 1
