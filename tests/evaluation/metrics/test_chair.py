from __future__ import annotations

import pytest

from mmefficient.evaluation.metrics.chair import Lexicon, chair
from mmefficient.evaluation.task import Output, Record

LEXICON = Lexicon(
    {
        "dog": ("dogs",),
        "hot dog": ("hot dogs",),
        "bus": ("buses",),
        "mouse": ("mice",),
        "sheep": ("sheep",),
        "scissors": ("pairs of scissors",),
        "light bulb": ("light bulbs",),
        "traffic light": ("traffic lights",),
        "bear": ("bears",),
        "teddy bear": ("teddy bears",),
    }
)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("A hot dog.", ["hot dog"]),
        ("A hot-dog, two dogs and three buses.", ["hot dog", "dog", "bus"]),
        ("a dog and another dog", ["dog", "dog"]),
        ("two pairs of scissors, a pair of scissors", ["scissors", "scissors"]),
        ("four mice among sheep", ["mouse", "sheep"]),
        ("a traffic light bulb", ["traffic light"]),  # overlapping names: the first takes its words
        ("traffic and light", []),
        ("dogma, busy, the dog's bed", []),
        ("A TEDDY bear; a bear!", ["teddy bear", "bear"]),
        ("", []),
    ],
)
def test_mentions(text: str, mentions: list[str]) -> None:
    assert LEXICON.mentions(text) == mentions


def test_scores_equal_those_computed_by_hand() -> None:
    cases = [
        # present, caption, hit the length limit: hallucinated/mentions, recalled/present
        (("dog", "bus"), "a dog, two buses and a hot dog.", False),  # 1/3, 2/2
        (("hot dog",), "a hot dog.", False),  # 0/1, 1/1
        (("sheep", "mouse", "dog"), "nothing.", False),  # 0/0, 0/3
        (("dog",), "a dog. a bear and a bear and a te", True),  # 0/1, 1/1: the unfinished sentence is dropped
        (("bus",), "a bear, " * 8 + "a bea", True),  # 8/8, 0/1: nothing finished, the last word is dropped
    ]
    records = [Record(str(i), "caption", "?", str(i), truth) for i, (truth, _, _) in enumerate(cases)]
    ratios = chair(LEXICON)(records, [Output(text, cut) for _, text, cut in cases])
    sums = {name: (ratio.numerator.sum(), ratio.denominator.sum()) for name, ratio in ratios.items()}
    assert sums == {
        "chair_s": (2, 5),
        "chair_i": (9, 13),
        "recall": (4, 8),
        "length": (8 + 3 + 1 + 10 + 18, 5),
        "repeated_8gram": (1, 5),
        "truncated": (2, 5),
        "without_objects": (1, 5),
    }
    assert ratios["length"].unit == "words"
