from __future__ import annotations

import pytest

from mmefficient.evaluation.metrics.categories import by_category
from mmefficient.evaluation.metrics.choice import choice, circular, letter, letter_scienceqa
from mmefficient.evaluation.task import Output, Record

OPTIONS = ("apple", "pear", "ripe plum")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("B", "B"),
        (" B \n", "B"),
        ("B.", "B"),
        ("B. pear", "B"),
        ("(B) pear", "B"),
        ("B: pear", "B"),
        ("The answer is C.", "C"),
        ("Answer: (C)", "C"),
        ("I choose (C) here", "C"),
        ("either (A) or (C)", None),
        ("It is the Pear", "B"),
        ("apple or pear", None),
        ("D", None),  # there is no fourth option
        ("A bear", None),  # an article is not a choice
        ("b", None),
        ("", None),
    ],
)
def test_letter(text: str, chosen: str | None) -> None:
    assert letter(text, OPTIONS) == chosen


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("B", "B"),
        ("B. pear", "B"),
        ("B.", None),  # LLaVA's parser wants a space after the stop
        ("The answer is B.", "B"),
        ("So the answer: The answer is B", "B"),
        ("The answer is A. The answer is B.", None),
        ("D", None),
        ("pear", None),
        ("", None),
    ],
)
def test_letter_as_llava_reads_scienceqa(text: str, chosen: str | None) -> None:
    assert letter_scienceqa(text, OPTIONS) == chosen


def rotations(item: str, right: int, options: tuple[str, ...]) -> list[Record]:
    return [
        Record(
            f"{item}/{turn}",
            "question",
            "?",
            item,
            ("ABC"[(right - turn) % 3], *options[turn:], *options[:turn]),
            None,
            item,
        )
        for turn in range(3)
    ]


def test_circular_wants_every_rotation_right() -> None:
    first, second, third = (rotations(item, 1, OPTIONS) for item in "xyz")
    records = [*first, *second, *third[:2]]
    assert [record.truth[0] for record in first] == ["B", "A", "C"]
    said = [*"BAC", *"BBC", *"BA"]  # the third item lacks a rotation
    ratios = circular(records, [Output(text) for text in said])
    assert (ratios["circular"].numerator.sum(), ratios["circular"].denominator.sum()) == (1, 2)
    assert (ratios["accuracy"].numerator.sum(), ratios["accuracy"].denominator.sum()) == (7, 8)


def test_categories_are_reported_besides_the_whole() -> None:
    records = [*rotations("x", 1, OPTIONS), *rotations("y/z", 0, OPTIONS)]
    outputs = [Output(text) for text in ("B", "A", "C", "B", "?", "B")]
    ratios = by_category(choice(), "accuracy")(records, outputs)
    sums = {name: (ratio.numerator.sum(), ratio.denominator.sum()) for name, ratio in ratios.items()}
    assert sums == {"accuracy": (4, 6), "unparsed": (1, 6), "accuracy[x]": (3, 3), "accuracy[y-z]": (1, 3)}
